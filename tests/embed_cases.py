"""Embeds some samples of a split in every rank, and keeps what each rank found and how often it asked the network."""

import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from dpkd.data.settings import LoaderSettings
from dpkd.data.shards import Dataset
from dpkd.engine.frozen import Frozen
from dpkd.engine.world import World, join
from dpkd.models.saved import load_network
from dpkd.priors.store import PriorSet
from dpkd.stages.embed import embed_networks


def main() -> None:
    run, results = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    world = join()
    for count in map(int, sys.argv[3:]):
        np.savez(results / f"{count}-{world.rank}.npz", **embed(run, world, count=count))
    world.leave()


class Counting(Frozen):
    """A network that counts how often it predicts."""

    calls: ClassVar[int] = 0

    def predict(self, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        Counting.calls += 1
        return super().predict(*inputs)


def embed(run: Path, world: World, *, count: int) -> dict[str, Any]:
    """Embeds the first samples of the split novel, backwards."""
    network = load_network(run / "students" / "vit")[1]
    dataset = Dataset.open(str(run / "shards"))
    before = Counting.calls
    counting = Counting(network.spec, network)
    split = dataset.split("novel")
    indices = np.arange(count)[::-1].copy()
    embedded = embed_networks(
        {"vit": counting},
        split,
        maps=PriorSet.open(dataset.url, "default").split("novel"),
        map_size=8,
        world=world,
        loader=LoaderSettings(workers=0),
        batch_size=4,
        indices=indices,
    )
    return {
        "embedding": embedded["vit"].embedding_ND,
        "label": split.label_N[indices],
        "calls": Counting.calls - before,
    }
