"""Distillation: one teacher, several students at once, and for comparison the same students on labels alone.

Makes `students/<name>`, `baselines/<name>`, and `teacher-live/` where the teacher goes on learning. A baseline is one
more network in the same loop, so it sees the same images in the same views, for the same steps.
"""

from dpkd.backends.engines import make_frozen
from dpkd.engine.frozen import Frozen
from dpkd.models.network import Network
from dpkd.models.saved import load_network, save_network
from dpkd.models.settings import MeanPooling
from dpkd.objectives.settings import Supervised
from dpkd.settings import DistillSettings, StudentSettings, TeachSettings
from dpkd.stages.run import Run, TrainingSet, training_set
from dpkd.stages.teach import NAME as TEACHER
from dpkd.stages.training import make_learner, network_spec, new_network, run_training, supervision
from dpkd.train.task import DistillTask, Learner


def distill(run: Run, settings: DistillSettings, *, teach: TeachSettings) -> None:
    """Trains all students and baselines, going on from the newest checkpoint, and saves their weights."""
    wanted = [loss for student in settings.students.values() for loss in student.losses]
    data = training_set(run, settings.training, wanted)
    _, network = load_network(run.folder.teacher)
    teacher = _teacher(run, network, data, settings=settings, teach=teach)
    students = _students(run, network, data, settings)
    task = DistillTask(
        students, teacher=teacher, teacher_name=TEACHER, supervision=supervision(run, data), seed=run.seed
    )
    run_training(run, task, data, stage="distill", training=settings.training, augment=settings.augment)
    for name, learner in task.learners.items():
        weights = learner.engine.weights()
        if run.world.rank == 0:
            run.folder.check_fence()
            save_network(run.folder.network(name), learner.spec, weights)
    run.world.barrier()


def _teacher(
    run: Run, network: Network, data: TrainingSet, *, settings: DistillSettings, teach: TeachSettings
) -> Frozen | Learner:
    if settings.teacher == "frozen":
        precision = run.precision(settings.training)
        return make_frozen(network, settings=teach.engine, world=run.world, precision=precision)
    return make_learner(
        run,
        network,
        settings=teach,
        objectives=teach.objectives,
        training=settings.training,
        total_steps=settings.training.num_steps(data.num_samples),
    )


def _students(run: Run, teacher: Network, data: TrainingSet, settings: DistillSettings) -> dict[str, Learner]:
    learners = {}
    for place, (name, student) in enumerate(settings.students.items(), start=1):
        wanted = {f"student-{name}": student}
        if student.baseline:
            wanted[f"baseline-{name}"] = on_labels_alone(student)
        for key, each in wanted.items():
            spec = network_spec(run, data, each.model, each.losses, teacher=teacher)
            learners[key] = make_learner(
                run,
                new_network(run, spec, place=place),
                settings=each,
                objectives=each.losses,
                training=settings.training,
                total_steps=settings.training.num_steps(data.num_samples),
            )
    return learners


def on_labels_alone(student: StudentSettings) -> StudentSettings:
    """The same student with mean pooling and its supervised loss alone (plain cross-entropy where it has none)."""
    supervised = tuple(
        loss.model_copy(update={"weight": 1.0}) for loss in student.losses if isinstance(loss, Supervised)
    )
    model = student.model.model_copy(update={"pooling": MeanPooling()})
    return student.model_copy(update={"model": model, "losses": supervised or (Supervised(),)})
