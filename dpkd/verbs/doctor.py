"""Whether this machine has what training needs, and what to do where it has not."""

import os
import platform
import shutil
import sys
from importlib import metadata

from dpkd.log import logger

PACKAGES = ("torch", "torchvision", "timm", "deepspeed", "ray", "tensorboard", "onnx", "onnxruntime")
CPU_TOOLS = {
    "a C++ compiler": (("c++", "g++", "clang++"), "install g++"),
    "ninja": (("ninja",), "pip install ninja, and activate the environment"),
}
"""What engine.kind=deepspeed needs on a CPU: programs, any of which will do, and how to get one."""


def doctor() -> None:
    """Prints a line for each thing looked for, with the way out where it is missing."""
    logger.info(f"python {platform.python_version()} at {sys.executable}, {os.cpu_count()} cores")
    installed = {package.metadata["Name"].lower(): package.version for package in metadata.distributions()}
    for name in PACKAGES:
        logger.info(f"  {name:<12} {installed.get(name) or f'missing: pip install {name}'}")
    if "torch" in installed:
        # here, not at the top: the command line loads this module, and torch takes seconds or may be missing
        import torch  # noqa: PLC0415

        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            logger.info(f"  GPU {index}: {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB")
        if not torch.cuda.device_count():
            logger.info("  no GPU: training runs on the CPU with the plain PyTorch engine")
            for name, (programs, way_out) in CPU_TOOLS.items():
                there = any(map(shutil.which, programs))
                logger.info(f"  {name}: {'found' if there else f'missing; engine.kind=deepspeed needs it: {way_out}'}")
    logger.info(f"  disk: {shutil.disk_usage('.').free / 1e9:.0f} GB free here")
