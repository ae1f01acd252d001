"""Embeds some samples of a split in every rank, and keeps what each rank found and how often it asked the network."""

import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from dpkd.engine.network import Frozen
from dpkd.engine.world import join
from dpkd.models.saved import load_network
from dpkd.settings import parse_settings
from dpkd.stages.networks import embed_networks
from dpkd.stages.run import Run


def main() -> None:
    settings, results = parse_settings(json.loads(Path(sys.argv[1]).read_text()), origin="test"), Path(sys.argv[2])
    torch.set_num_threads(1)
    world = join()
    for count in map(int, sys.argv[3:]):
        np.savez(results / f"{count}-{world.rank}.npz", **embed(Run.open(settings, world), count=count))
    world.leave()


class Counting(Frozen):
    """A network that counts how often it predicts."""

    calls: ClassVar[int] = 0

    def predict(self, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        Counting.calls += 1
        return super().predict(*inputs)


def embed(run: Run, *, count: int) -> dict[str, Any]:
    """Embeds the first samples of the split novel, backwards."""
    network = load_network(run.folder.students / "vit")
    before = Counting.calls
    split = run.dataset.split("novel")
    indices = np.arange(count)[::-1].copy()
    networks = {"vit": Counting(network.spec, network)}
    embedded = embed_networks(run, networks, split, indices=indices, batch_size=4)
    return {
        "embedding": embedded["vit"]["embedding"],
        "label": split.label_N[indices],
        "calls": Counting.calls - before,
    }
