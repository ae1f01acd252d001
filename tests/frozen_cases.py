"""Runs frozen networks, whole and sharded, and counts the bytes of their weights on this rank.

`main` writes `FOLDER/<world size>-<rank>.pt`, a mapping from each model to what was found.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpkd.backends.engines import make_frozen
from dpkd.engine.settings import EngineSettings
from dpkd.engine.world import World, join
from dpkd.models.network import build_network
from dpkd.models.settings import HeadSpec, ModelSettings, NetworkSpec

MODELS = {"vit_tiny_patch16_224": {"depth": 6}, "resnet18": {}}
SIDE, PASSES = 32, 3


def bytes_held(network: nn.Module) -> int:
    """Bytes of weights on this rank now: shards, and what is whole."""
    parameters: list[Any] = list(network.parameters())
    shards = [parameter.ds_tensor for parameter in parameters if hasattr(parameter, "ds_tensor")]
    return 4 * sum(tensor.numel() for tensor in [*shards, *(parameter.data for parameter in parameters)])


def case(name: str, arguments: dict[str, Any], world: World, kind: Any) -> dict[str, Any]:
    spec = NetworkSpec(
        model=ModelSettings(name=name, arguments=arguments),
        classes=("a", "b"),
        image_size=SIDE,
        mean=(0.5,) * 3,
        std=(0.2,) * 3,
        heads={"prior/hog": HeadSpec(reads="patch", width=9)},
    )
    network = build_network(spec, seed=0)
    shapes = [parameter.shape for parameter in network.parameters()]
    settings = EngineSettings(kind=kind, zero_stage=3 if kind == "deepspeed" else 1)
    frozen = make_frozen(network, settings=settings, world=world, precision="fp32")
    peak = 0

    def count(*_: Any) -> None:
        nonlocal peak
        peak = max(peak, bytes_held(network))

    for module in network.modules():
        if not list(module.children()):
            module.register_forward_hook(count)
    generator = torch.Generator().manual_seed(world.rank)
    image_BCHW = torch.randn(4, 3, SIDE, SIDE, generator=generator)
    outputs = [frozen.predict(image_BCHW) for _ in range(PASSES)]
    return {"outputs": outputs, "shapes": shapes, "held": bytes_held(network), "peak": peak}


def main() -> None:
    torch.set_num_threads(1)
    world = join()
    found = {
        name: {kind: case(name, arguments, world, kind) for kind in ("torch", "deepspeed")}
        for name, arguments in MODELS.items()
    }
    torch.save(found, Path(sys.argv[1]) / f"{world.size}-{world.rank}.pt")
    world.leave()
