"""Embeds some samples of a split in every rank, and keeps what each rank found and how often it asked the network."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpkd.data.settings import LoaderSettings
from dpkd.data.shards import Dataset
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


def embed(run: Path, world: World, *, count: int) -> dict[str, Any]:
    """Embeds the first samples of the split novel, backwards."""
    spec, network = load_network(run / "students" / "vit")
    dataset = Dataset.open(str(run / "shards"))
    calls = 0

    def predict(image_BCHW: torch.Tensor, weight_B1HW: torch.Tensor | None) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        with torch.no_grad():
            outputs: dict[str, torch.Tensor] = network(image_BCHW, weight_B1HW)
        return outputs

    split = dataset.split("novel")
    indices = np.arange(count)[::-1].copy()
    embedded = embed_networks(
        {"vit": (predict, spec)},
        split,
        maps=PriorSet.open(dataset.url, "default").split("novel"),
        map_size=8,
        world=world,
        loader=LoaderSettings(workers=0),
        batch_size=4,
        indices=indices,
    )
    return {"embedding": embedded["vit"].embedding_ND, "label": split.label_N[indices], "calls": calls}
