"""A check of the packages and devices of this machine, with the way out for missing ones."""

import os
import platform
import shutil
import sys

from dpkd.log import logger
from dpkd.run.attempt import installed_version

PACKAGES = ("torch", "torchvision", "timm", "deepspeed", "ray", "tensorboard", "onnx", "onnxruntime")


def doctor() -> None:
    """Prints one line per package and device, with the way out if it is missing."""
    logger.info(f"python {platform.python_version()} at {sys.executable}, {os.cpu_count()} cores")
    for name in PACKAGES:
        package = "'dpkd[train]'" if name in ("deepspeed", "ray", "tensorboard") else name
        logger.info(f"  {name:<12} {installed_version(name) or f'missing: pip install {package}'}")
    if installed_version("torch"):
        # not at the top: torch may be missing
        import torch  # noqa: PLC0415

        gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        for index, gpu in enumerate(gpus):
            logger.info(f"  GPU {index}: {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB")
        if not gpus:
            logger.info("  no GPU: training runs on the CPU with the plain PyTorch engine")
    logger.info(f"  disk: {shutil.disk_usage('.').free / 1e9:.0f} GB free here")
