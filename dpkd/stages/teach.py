"""Teachers: each a network under its own objectives. Makes `teachers/<name>` in the run folder."""

from collections.abc import Iterable

from dpkd.backends.engines import make_frozen
from dpkd.engine.network import Frozen
from dpkd.engine.settings import TrainingSettings
from dpkd.models.network import Network
from dpkd.objectives.base import Objective, teacher_of
from dpkd.stages.run import Run, supervision, training_set
from dpkd.stages.training import Stage, make_learner, network_spec, new_network, teacher_network
from dpkd.train.task import Task


def teach(run: Run, name: str, *, stage: str) -> None:
    """Trains one teacher from its newest checkpoint on, and saves its weights."""
    settings = run.settings.teachers[name]
    place, names = list(run.settings.trained_teachers).index(name), list(run.settings.teachers)
    data = training_set(run, settings.training, settings.objectives)
    earlier = followed_teachers(settings.objectives, names[: names.index(name)])
    followed = {other: teacher_network(run, other) for other in earlier}
    spec = network_spec(run, data, settings.model, settings.objectives, teachers=followed)
    learner = make_learner(
        run,
        # students have the places from 1 on
        new_network(run, spec, place=-place, weights=settings.weights),
        settings=settings,
        training=settings.training,
        total_steps=settings.training.num_steps(data.num_samples),
    )
    teachers = {other: frozen(run, other, network, settings.training) for other, network in followed.items()}
    task = Task({name: learner}, teachers=teachers, supervision=supervision(run, data), seed=run.seed)
    Stage(run, task, data, stage, settings.training, settings.augment).execute(folder_of=run.folder.teacher)


def followed_teachers(objectives: Iterable[Objective], teachers: Iterable[str]) -> list[str]:
    """Those of the teachers that the objectives follow, in order; an objective that names none follows the only one."""
    following = [objective for objective in objectives if objective.needs().teacher]
    names = {teacher_of(objective) for objective in following}
    return [name for name in teachers if name in names or None in names]


def frozen(run: Run, name: str, network: Network, training: TrainingSettings) -> Frozen:
    """A teacher that no longer learns, sharded over the ranks where its engine shards weights."""
    engine = run.settings.teachers[name].engine
    return make_frozen(network, settings=engine, world=run.world, precision=run.precision(training))
