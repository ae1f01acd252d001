"""The networks of the training stages, each with the heads that its objectives need, and in its engine."""

from collections.abc import Iterable, Mapping
from typing import Any

import timm

from dpkd.backends.engines import make_engine, make_frozen
from dpkd.engine.network import Frozen
from dpkd.engine.settings import TrainingSettings
from dpkd.models.network import Network, build_network
from dpkd.models.parameters import parameter_groups
from dpkd.models.saved import load_network
from dpkd.models.settings import HeadSpec, NetworkSpec
from dpkd.objectives.base import VIEW_MAPS, Objective, teacher_of
from dpkd.settings import StudentSettings, TeacherSettings
from dpkd.stages.plan import attribute_table
from dpkd.stages.run import Run, TrainingSet
from dpkd.train.task import Learner

HEAD_FAMILIES = ("prior", "to_teacher", "attributes", "region")
"""The order in which the weights of heads are drawn, by the first part of their names; others come last."""


def new_network(
    run: Run,
    data: TrainingSet,
    settings: TeacherSettings | StudentSettings,
    *,
    teachers: Mapping[str, Network],
    place: int,
) -> Network:
    """A network to be trained; its first weights depend on the run's seed and its place among the networks alone."""
    table = attribute_table(run.data)
    channels = VIEW_MAPS | (run.priors.channels if run.priors is not None else {})
    width_of = {f"map.{name}": count for name, count in channels.items()}
    if table is not None:
        width_of["attributes"] = len(table.names)
    heads: dict[str, HeadSpec] = {}
    for objective in settings.objectives:
        needs = objective.needs()
        if needs.teacher:
            teacher = teachers[teacher_of(objective) or next(iter(teachers))].backbone
            width_of |= {"teacher.embedding": teacher.embedding_dim, "teacher.patch": teacher.patch_dim}
        for name, head in needs.heads.items():
            width = head.width if isinstance(head.width, int) else width_of[head.width]
            heads[name] = HeadSpec(reads=head.reads, width=width)
    families = {name: number for number, name in enumerate(HEAD_FAMILIES)}
    ordered = sorted(heads, key=lambda name: (families.get(name.partition("/")[0], len(families)), name))
    spec = NetworkSpec(
        model=settings.model,
        classes=data.class_names,
        image_size=run.data.image_size,
        mean=run.dataset.manifest.image_mean,
        std=run.dataset.manifest.image_std,
        heads={name: heads[name] for name in ordered},
        attributes=table.names if table is not None and "attributes" in heads else (),
    )
    return build_network(spec, seed=run.seed * 1000 + place, weights=settings.weights)


def followed_teachers(run: Run, objectives: Iterable[Objective], names: Iterable[str]) -> dict[str, Network]:
    """Those of the teachers `names` that the objectives follow; an objective that names none follows the only one."""
    followed = {teacher_of(objective) for objective in objectives if objective.needs().teacher}
    return {name: teacher_network(run, name) for name in names if name in followed or None in followed}


def teacher_network(run: Run, name: str) -> Network:
    """The network of a teacher, on CPU: as the stage `teach` left it, or with its given weights if never trained.

    A teacher that is never trained has no logits, and sees images normalised as its weights expect.
    """
    teacher = run.settings.teachers[name]
    if teacher.objectives:
        return load_network(run.folder.teacher(name))[1]
    config: Any = timm.get_pretrained_cfg(teacher.model.name)
    spec = NetworkSpec(
        model=teacher.model, classes=(), image_size=run.data.image_size, mean=config.mean, std=config.std
    )
    return build_network(spec, seed=run.seed, weights=teacher.weights).eval()


def frozen_teacher(run: Run, name: str, network: Network, training: TrainingSettings) -> Frozen:
    """A teacher that no longer learns, sharded over the ranks where its engine shards weights."""
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
    """Puts a network into its engine; every rank calls it with the same weights."""
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
        optimizer=optimizer,
        schedule=settings.schedule,
        total_steps=training.num_steps(data.num_samples),
    )
