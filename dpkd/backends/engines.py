"""Picks the engine that the settings name."""

from typing import Any

import torch
from torch import nn

from dpkd.engine.protocol import Engine
from dpkd.engine.settings import EngineSettings
from dpkd.engine.torch_engine import TorchEngine


def engine_kind(settings: EngineSettings) -> str:
    """`auto` is DeepSpeed where there is a GPU, and plain PyTorch on a CPU."""
    if settings.kind != "auto":
        return settings.kind
    return "deepspeed" if torch.cuda.is_available() else "torch"


def make_engine(module: nn.Module, *, settings: EngineSettings, **arguments: Any) -> Engine:
    """The engine that the settings name around a network; `TorchEngine` documents the arguments."""
    if engine_kind(settings) == "torch":
        return TorchEngine(module, settings=settings, **arguments)
    # here, not at the top: importing DeepSpeed takes seconds and needs its tools, which plain PyTorch runs do without
    from dpkd.backends.deepspeed_engine import DeepSpeedEngine  # noqa: PLC0415

    return DeepSpeedEngine(module, settings=settings, **arguments)
