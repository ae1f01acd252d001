"""Whether this machine has what training needs, and what to do where it has not."""

import os
import platform
import shutil
import sys
from importlib import metadata

import torch

from dpkd.log import logger

PACKAGES = ("torch", "torchvision", "timm", "deepspeed", "ray", "webdataset", "tensorboard", "onnx", "onnxruntime")


def doctor() -> None:
    """Prints a line for each thing looked at, with the way out where it is missing."""
    logger.info(f"python {platform.python_version()} at {sys.executable}, {os.cpu_count()} cores")
    found = {each.metadata["Name"].lower(): each.version for each in metadata.distributions()}
    for name in PACKAGES:
        logger.info(f"  {name:<12} {found.get(name) or f'missing: pip install {name}'}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        gpu = torch.cuda.get_device_properties(index)
        logger.info(f"  GPU {index}: {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB")
    if not count:
        logger.info("  no GPU: training runs on the CPU with the plain PyTorch engine")
        _say_tool("a C++ compiler", ("c++", "g++", "clang++"), way_out="install g++")
        _say_tool("ninja", ("ninja",), way_out="pip install ninja, and activate the environment")
    size_gb = shutil.disk_usage(".").free / 1e9
    logger.info(f"  disk: {size_gb:.0f} GB free here")


def _say_tool(name: str, programs: tuple[str, ...], *, way_out: str) -> None:
    found = any(shutil.which(program) for program in programs)
    logger.info(f"  {name}: " + ("found" if found else f"missing; engine.kind=deepspeed needs it on a CPU: {way_out}"))
