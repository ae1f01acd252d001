"""Teachers: each a network under its own objectives. Makes `teachers/<name>` in the run folder."""

from collections.abc import Iterable

from dpkd.backends.engines import make_frozen
from dpkd.engine.frozen import Frozen
from dpkd.engine.settings import TrainingSettings
from dpkd.models.network import Network
from dpkd.models.saved import save_network
from dpkd.objectives.base import Objective, teacher_of
from dpkd.stages.run import Run, supervision, training_set
from dpkd.stages.training import Stage, make_learner, network_spec, new_network, teacher_network
from dpkd.train.task import Task


def teach(run: Run, name: str, *, stage: str) -> None:
    """Trains one teacher, going on from its newest checkpoint, and saves its weights."""
    settings = run.settings.teachers[name]
    place = list(run.settings.trained_teachers).index(name)
    data = training_set(run, settings.training, settings.objectives)
    earlier = list(run.settings.teachers)[: list(run.settings.teachers).index(name)]
    followed = {each: teacher_network(run, each) for each in followed_teachers(settings.objectives, earlier)}
    spec = network_spec(run, data, settings.model, settings.objectives, teachers=followed)
    learner = make_learner(
        run,
        # students have the places from 1 on
        new_network(run, spec, place=-place, weights=settings.weights),
        settings=settings,
        training=settings.training,
        total_steps=settings.training.num_steps(data.num_samples),
    )
    teachers = {each: frozen(run, each, network, settings.training) for each, network in followed.items()}
    task = Task({name: learner}, teachers=teachers, supervision=supervision(run, data), seed=run.seed)
    Stage(run, task, data, stage, settings.training, settings.augment).execute()
    weights = learner.engine.weights()
    if run.world.rank == 0:
        run.folder.check_fence()
        save_network(run.folder.teacher(name), spec, weights)
    run.world.barrier()


def followed_teachers(objectives: Iterable[Objective], teachers: Iterable[str]) -> list[str]:
    """Those of the teachers that the objectives follow, in order; an objective that names none follows the only one."""
    following = [objective for objective in objectives if objective.needs().teacher]
    names = {teacher_of(objective) for objective in following}
    return [name for name in teachers if name in names or None in names]


def frozen(run: Run, name: str, network: Network, training: TrainingSettings) -> Frozen:
    """A teacher that no longer learns, sharded over the ranks where its engine shards weights."""
    engine = run.settings.teachers[name].engine
    return make_frozen(network, settings=engine, world=run.world, precision=run.precision(training))
