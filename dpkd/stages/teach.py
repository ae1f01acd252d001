"""The teacher: one network under its own objectives. Makes `teacher/` in the run folder."""

from dpkd.models.saved import save_network
from dpkd.settings import TeachSettings
from dpkd.stages.run import Run, training_set
from dpkd.stages.training import make_learner, network_spec, new_network, run_training, supervision
from dpkd.train.task import TeachTask

NAME = "teacher"


def teach(run: Run, settings: TeachSettings) -> None:
    """Trains the teacher, going on from its newest checkpoint, and saves its weights."""
    data = training_set(run, settings.training, settings.objectives)
    spec = network_spec(run, data, settings.model, settings.objectives)
    learner = make_learner(
        run,
        new_network(run, spec, place=0),
        settings=settings,
        objectives=settings.objectives,
        training=settings.training,
        total_steps=settings.training.num_steps(data.num_samples),
    )
    task = TeachTask(learner, name=NAME, supervision=supervision(run, data), seed=run.seed)
    run_training(run, task, data, stage="teach", training=settings.training, augment=settings.augment)
    weights = learner.engine.weights()
    if run.world.rank == 0:
        run.folder.check_fence()
        save_network(run.folder.teacher, spec, weights)
    run.world.barrier()
