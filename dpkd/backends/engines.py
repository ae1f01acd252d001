"""Picks the engine that the settings name, and how a frozen network is spread."""

from typing import Any

import torch
from torch import nn

from dpkd.engine.network import Frozen, InPrecision
from dpkd.engine.protocol import Engine
from dpkd.engine.settings import EngineSettings
from dpkd.engine.torch_engine import TorchEngine
from dpkd.engine.world import World


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


def make_frozen(network: Any, *, settings: EngineSettings, world: World, precision: str) -> Frozen:
    """A network that only predicts: sharded over the ranks by DeepSpeed at `zero_stage` 3, else whole on every rank.

    Every rank calls it with the same weights.
    """
    runner = InPrecision(network.eval().requires_grad_(False), device=world.device, precision=precision)
    if engine_kind(settings) == "torch" or settings.zero_stage < 3 or world.size == 1:
        return Frozen(network.spec, runner.to(world.device))
    from dpkd.backends.deepspeed_engine import shard_frozen  # noqa: PLC0415

    return Frozen(network.spec, shard_frozen(runner, world=world))
