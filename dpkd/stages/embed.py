"""What networks make of a split: each image is read and decoded once for all of them, shared out among the ranks.

Axes: N sample, B image of a batch, C channel, H W height and width, D feature, K class, A attribute.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpkd.data.settings import GLOBAL, LoaderSettings
from dpkd.data.shards import Split
from dpkd.data.stream import MapReader, evaluation_batches
from dpkd.engine.world import World
from dpkd.launch.heartbeat import pulse
from dpkd.train.task import Predictor, network_inputs, pooling_maps

NUM_MEAN_SAMPLES = 2048
"""Training images whose mean embedding stands for that of the split."""


KEPT = ("embedding", "logits", "attributes")
"""Outputs of a network that are kept of every sample."""


@dataclass(frozen=True)
class Embedded:
    """A network's outputs for samples of a split, in the order asked for."""

    embedding_ND: NDArray[np.float32]
    logits_NK: NDArray[np.float32] | None
    """None for a network without classes."""
    attribute_NA: NDArray[np.float32] | None = None
    """Logits of attributes; None for a network that predicts none."""


def embed_networks(
    networks: Mapping[str, Predictor],
    split: Split,
    *,
    maps: MapReader | None,
    map_size: int,
    world: World,
    loader: LoaderSettings,
    batch_size: int = 128,
    indices: NDArray[np.int64] | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Embedded]:
    """Embeddings and logits of every network for the samples `indices` (all, where none), the same on every rank.

    Every rank calls it, and makes the same number of predictions, as networks spread over the ranks need. All networks
    must take images of one size. `advance` is told how many images were embedded, over all ranks.
    """
    wanted = np.arange(split.num_samples) if indices is None else indices
    share = -(-len(wanted) // world.size)
    # the last rank's share is filled up with samples from the front, dropped again below
    mine = np.resize(wanted, share * world.size)[world.rank * share : (world.rank + 1) * share]
    specs = [network.spec for network in networks.values()]
    assert len({spec.image_size for spec in specs}) == 1, "networks that share batches take images of one size"
    names = frozenset().union(*(pooling_maps(spec) for spec in specs))
    batches = evaluation_batches(
        split,
        indices=mine,
        maps=maps.only(sorted(names)) if maps is not None and names else None,
        image_size=specs[0].image_size,
        map_size=map_size,
        batch_size=batch_size,
        loader=loader,
    )
    found: dict[str, list[dict[str, NDArray[np.float32]]]] = {name: [] for name in networks}
    for batch in batches:
        here = batch.to(world.device)
        for name, network in networks.items():
            outputs = network.predict(*network_inputs(network.spec, here.views[GLOBAL]))
            found[name].append({key: _array(outputs[key]) for key in KEPT if key in outputs})
        pulse()
        advance(len(here.index_B) * world.size)
    return {name: _whole(parts, world, num_samples=len(wanted)) for name, parts in found.items()}


def _whole(parts: list[dict[str, NDArray[np.float32]]], world: World, *, num_samples: int) -> Embedded:
    mine = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    ranks = world.gather(mine)
    whole = {key: np.concatenate([rank[key] for rank in ranks])[:num_samples] for key in mine}
    return Embedded(whole["embedding"], whole.get("logits"), whole.get("attributes"))


def spread(indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """Samples spread evenly over those of a split, enough for its mean embedding."""
    count = min(NUM_MEAN_SAMPLES, len(indices))
    return indices[np.linspace(0, len(indices) - 1, count).round().astype(np.int64)]


def _array(tensor: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.detach().to("cpu", torch.float32).numpy()
    return array
