"""Creates the engine of the settings, and frozen networks, whole or sharded."""

from typing import Any

from torch import nn

from dpkd.engine.network import Frozen, InPrecision, cast_layers
from dpkd.engine.protocol import Engine
from dpkd.engine.settings import EngineSettings
from dpkd.engine.torch_engine import TorchEngine
from dpkd.engine.world import World


def engine_kind(settings: EngineSettings, *, world: World) -> str:
    """The kind of engine; `auto` is DeepSpeed on several GPUs, else plain PyTorch: ZeRO shards nothing on one."""
    if settings.kind != "auto":
        return settings.kind
    return "deepspeed" if world.device.type == "cuda" and world.size > 1 else "torch"


def make_engine(module: nn.Module, *, settings: EngineSettings, world: World, **arguments: Any) -> Engine:
    """Creates the engine of the settings for a network; `TorchEngine` shows the arguments."""
    if engine_kind(settings, world=world) == "torch":
        return TorchEngine(module, settings=settings, world=world, **arguments)
    # not at the top: the import of DeepSpeed takes seconds and needs tools that runs with plain PyTorch do not need
    from dpkd.backends.deepspeed_engine import DeepSpeedEngine  # noqa: PLC0415

    return DeepSpeedEngine(module, settings=settings, world=world, **arguments)


def make_frozen(network: Any, *, settings: EngineSettings, world: World, precision: str) -> Frozen:
    """A network that only predicts: sharded over the ranks by DeepSpeed at `zero_stage` 3, whole otherwise.

    Every rank calls it with the same weights.
    """
    if precision == "bf16":
        cast_layers(network)
    runner = InPrecision(network.eval().requires_grad_(False), device=world.device, precision=precision)
    if engine_kind(settings, world=world) == "torch" or settings.zero_stage < 3 or world.size == 1:
        return Frozen(network.spec, runner.to(world.device))
    from dpkd.backends.deepspeed_engine import shard_frozen  # noqa: PLC0415

    return Frozen(network.spec, shard_frozen(runner, world=world))
