"""Trains the small network of the engines' contract with gradients in one flat tensor and in buckets, on two ranks.

`main` writes `FOLDER/<rank>.pt`: a trace of each, and how many storages hold the gradients.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from dpkd.engine.torch_engine import TorchEngine
from dpkd.engine.world import join
from tests.engine_cases import STEPS, build, train


def main() -> None:
    torch.set_num_threads(1)
    world = join()
    found: dict[str, Any] = {"backend": torch.distributed.get_backend()}
    for name, overlap in (("flat", False), ("buckets", True), ("by default", None)):
        engine = build("torch", world, overlap=overlap)
        assert isinstance(engine, TorchEngine)
        found[name] = train(engine, world, first=0, last=STEPS)
        gradients = [parameter.grad for parameter in engine._parameters if parameter.grad is not None]
        found[f"{name} storages"] = len({gradient.untyped_storage().data_ptr() for gradient in gradients})
    torch.save(found, Path(sys.argv[1]) / f"{world.rank}.pt")
    world.leave()
