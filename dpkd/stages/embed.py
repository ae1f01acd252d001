"""Outputs of networks for a split: each image is read and decoded once for all networks, shared among the ranks.

Axes: N sample.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from dpkd.data.settings import GLOBAL
from dpkd.data.shards import Split
from dpkd.data.stream import evaluation_batches
from dpkd.launch.heartbeat import pulse
from dpkd.log import Progress
from dpkd.stages.run import Run
from dpkd.train.task import Predictor, network_inputs, pooling_maps

NUM_MEAN_SAMPLES = 2048
"""Training images that give the mean embedding of the training split."""
KEPT = ("embedding", "logits", "attributes")
"""Outputs of a network that are kept of every sample, where it has them."""

Embedded = dict[str, NDArray[np.float32]]
"""A network's outputs for samples of a split, in the order asked for: `embedding` ND, `logits` NK, `attributes` NA."""


def embed_networks(
    run: Run,
    networks: Mapping[str, Predictor],
    split: Split,
    *,
    indices: NDArray[np.int64],
    batch_size: int = 128,
    shown: bool = False,
) -> dict[str, Embedded]:
    """Outputs of every network for the samples `indices`, the same on every rank; `shown` draws a progress bar.

    Every rank calls it, and makes the same number of predictions, as networks sharded over the ranks need. All networks
    must take images of one size.
    """
    world, share = run.world, -(-len(indices) // run.world.size)
    # samples from the front fill up the last rank's share, and are dropped again below
    own_indices = np.resize(indices, share * world.size)[world.rank * share : (world.rank + 1) * share]
    specs = [network.spec for network in networks.values()]
    assert len({spec.image_size for spec in specs}) == 1, "networks that share batches take images of one size"
    batches = evaluation_batches(
        split,
        indices=own_indices,
        maps=run.maps_of(split.name, frozenset().union(*(pooling_maps(spec) for spec in specs))),
        image_size=specs[0].image_size,
        map_size=run.map_size,
        batch_size=batch_size,
        loader=run.data.loader,
    )
    parts: dict[str, list[Embedded]] = {name: [] for name in networks}
    with Progress(f"evaluate on {split.name}", len(indices), shown=shown and world.rank == 0) as progress:
        for batch in batches:
            view = batch.to(world.device).views[GLOBAL]
            for name, network in networks.items():
                outputs = network.predict(*network_inputs(network.spec, view))
                kept = {key: outputs[key].detach().to("cpu", torch.float32).numpy() for key in KEPT if key in outputs}
                parts[name].append(kept)
            pulse()
            progress.advance(len(batch.index_B) * world.size)
    embedded = {}
    for name, batches_of in parts.items():
        own = {key: np.concatenate([part[key] for part in batches_of]) for key in batches_of[0]}
        ranks = world.gather(own)
        embedded[name] = {key: np.concatenate([rank[key] for rank in ranks])[: len(indices)] for key in own}
    return embedded


def spread(indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """Samples spread evenly over those of a split, enough for its mean embedding."""
    count = min(NUM_MEAN_SAMPLES, len(indices))
    return indices[np.linspace(0, len(indices) - 1, count).round().astype(np.int64)]
