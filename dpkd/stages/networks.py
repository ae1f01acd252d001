"""The networks of the stages: built with the heads for their objectives, placed in engines, run over a split.

Axes: N sample, D feature, K class, A attribute.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from dpkd.backends.engines import make_engine, make_frozen
from dpkd.data.settings import GLOBAL
from dpkd.data.shards import Split
from dpkd.data.stream import evaluation_batches
from dpkd.engine.network import Frozen
from dpkd.engine.optimizer import learning_rate
from dpkd.engine.settings import TrainingSettings
from dpkd.launch.heartbeat import pulse
from dpkd.log import Progress
from dpkd.models.network import Network, build_network
from dpkd.models.parameters import parameter_groups
from dpkd.models.saved import load_network
from dpkd.models.settings import HeadSpec, NetworkSpec
from dpkd.objectives.base import VIEW_MAPS, Objective, teacher_of
from dpkd.settings import DataSettings, NetworkSettings, StudentSettings, TeacherSettings
from dpkd.stages.check_data import attribute_table
from dpkd.stages.run import Run, TrainingSet
from dpkd.train.task import Learner, Predictor, network_inputs, pooling_maps

HEAD_FAMILIES = ("prior", "to_teacher", "attributes", "region")
"""The order in which the weights of heads are drawn, by the first part of their names; other heads are last."""
NUM_MEAN_SAMPLES = 2048
"""Number of training images for the mean embedding of the training split."""
KEPT = ("embedding", "logits", "attributes")
"""Outputs of a network that are kept for every sample, if it has them."""

Embedded = dict[str, NDArray[np.float32]]
"""A network's outputs for given samples of a split, in their order: `embedding` ND, `logits` NK, `attributes` NA."""


def new_network(
    run: Run,
    data: TrainingSet,
    settings: TeacherSettings | StudentSettings,
    *,
    teachers: Mapping[str, Network],
    place: int,
) -> Network:
    """A network for training; its first weights depend only on the run's seed and its place among the networks."""
    channels, manifest = run.priors.channels if run.priors is not None else {}, run.dataset.manifest
    spec = network_spec(
        settings,
        data=run.data,
        classes=data.class_names,
        multi_label=data.label_NK is not None,
        channels=channels,
        teachers=teachers,
        statistics=(manifest.image_mean, manifest.image_std),
    )
    return build_network(spec, seed=run.seed * 1000 + place, weights=settings.weights)


def network_spec(
    settings: NetworkSettings,
    *,
    data: DataSettings,
    classes: tuple[str, ...],
    multi_label: bool = False,
    channels: Mapping[str, int],
    teachers: Mapping[str, Network],
    statistics: tuple[tuple[float, float, float], tuple[float, float, float]],
) -> NetworkSpec:
    """The spec of a network with the heads of its objectives.

    `channels` are those of the stored prior maps, `statistics` mean and deviation of the training images.
    """
    table = attribute_table(data)
    width_of = {f"map.{name}": count for name, count in {**VIEW_MAPS, **channels}.items()}
    width_of["classes+1"] = len(classes) + 1
    if data.masks is not None:
        width_of["masks"] = len(data.masks.names)
    if table is not None:
        width_of["attributes"] = len(table.names)
    heads: dict[str, HeadSpec] = {}
    for objective in settings.objectives:
        needs = objective.needs()
        if needs.teacher:
            teacher = teachers[teacher_of(objective) or next(iter(teachers))].backbone
            with_width = {"embedding", "patch", *needs.teacher} - {"logits", "patch_logits", "segmentation"}
            width_of |= {f"teacher.{output}": teacher.width(output) for output in with_width}
        for name, head in needs.heads.items():
            width = head.width if isinstance(head.width, int) else width_of[head.width]
            heads[name] = HeadSpec(reads=head.reads, width=width, hidden=head.hidden)
    families = {name: number for number, name in enumerate(HEAD_FAMILIES)}
    ordered = sorted(heads, key=lambda name: (families.get(name.partition("/")[0], len(families)), name))
    return NetworkSpec(
        model=settings.model,
        classes=classes,
        multi_label=multi_label,
        image_size=data.image_size,
        mean=statistics[0],
        std=statistics[1],
        heads={name: heads[name] for name in ordered},
        attributes=table.names if table is not None and "attributes" in heads else (),
    )


def followed_teachers(run: Run, objectives: Iterable[Objective], names: Iterable[str]) -> dict[str, Network]:
    """The teachers among `names` that the objectives follow, with the outputs that they need.

    An objective without a name follows the only teacher.
    """
    needed: dict[str | None, set[str]] = defaultdict(set)
    for objective in objectives:
        if objective.needs().teacher:
            needed[teacher_of(objective)].update(objective.needs().teacher)
    networks = {name: teacher_network(run, name) for name in names if name in needed or None in needed}
    for name, network in networks.items():
        network.extra = frozenset(needed[name] | needed[None])
    return networks


def teacher_network(run: Run, name: str) -> Network:
    """The network of a teacher, on the CPU: with the weights of its stage, or of its settings if never trained."""
    teacher = run.settings.teachers[name]
    if teacher.objectives:
        return load_network(run.folder.teacher(name))
    spec = untrained_spec(teacher, image_size=run.data.image_size)
    return build_network(spec, seed=run.seed, weights=teacher.weights).eval()


def untrained_spec(teacher: NetworkSettings, *, image_size: int) -> NetworkSpec:
    """The spec of a teacher that is never trained: without logits, and with the normalisation of its weights."""
    config: Any = timm.get_pretrained_cfg(teacher.model.name)
    mean, std = (config.mean, config.std) if config is not None else (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    return NetworkSpec(model=teacher.model, classes=(), image_size=image_size, mean=mean, std=std)


def frozen_teacher(run: Run, name: str, network: Network, training: TrainingSettings) -> Frozen:
    """A teacher that no longer learns; sharded over the ranks if its engine shards weights."""
    engine = run.settings.teachers[name].engine
    return make_frozen(network, settings=engine, world=run.world, precision=run.precision(training))


def make_learner(
    run: Run,
    data: TrainingSet,
    network: Network,
    *,
    settings: TeacherSettings | StudentSettings,
    training: TrainingSettings,
) -> Learner:
    """Creates the engine of a network; every rank calls it with the same weights."""
    optimizer = settings.optimizer
    groups = parameter_groups(network, weight_decay=optimizer.weight_decay, layer_decay=optimizer.layer_decay)
    engine = make_engine(
        network,
        settings=settings.engine,
        parameter_groups=groups,
        optimizer=optimizer,
        world=run.world,
        accumulation=run.micro_batches(training),
        micro_batch_size=run.micro_batch_size(training),
        precision=run.precision(training),
    )
    return Learner(
        engine=engine,
        network=network,
        objectives=settings.objectives,
        rate=partial(
            learning_rate,
            total_steps=training.num_steps(data.num_samples),
            base=optimizer.learning_rate,
            settings=settings.schedule,
        ),
    )


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

    Every rank calls it, and makes the same number of predictions, because networks may be sharded over the ranks. All
    networks must have the same image size.
    """
    world, share = run.world, -(-len(indices) // run.world.size)
    # the first samples fill the last rank's share, and are dropped below
    rank_indices = np.resize(indices, share * world.size)[world.rank * share : (world.rank + 1) * share]
    specs = [network.spec for network in networks.values()]
    assert len({spec.image_size for spec in specs}) == 1, "networks that share batches must have one image size"
    batches = evaluation_batches(
        split,
        indices=rank_indices,
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
        rank_outputs = {key: np.concatenate([part[key] for part in batches_of]) for key in batches_of[0]}
        ranks = world.gather(rank_outputs)
        embedded[name] = {key: np.concatenate([rank[key] for rank in ranks])[: len(indices)] for key in rank_outputs}
    return embedded


def spread(indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """Evenly spaced samples among `indices`, enough for the mean embedding of their split."""
    count = min(NUM_MEAN_SAMPLES, len(indices))
    return indices[np.linspace(0, len(indices) - 1, count).round().astype(np.int64)]
