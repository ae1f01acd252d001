"""Distillation: students at once under their teachers, and for comparison the same students on labels alone.

Makes `students/<name>`, `baselines/<name>`, and `teachers-live/<name>` for a teacher that goes on learning. A baseline
is one more network in the same loop, so it sees the same images in the same views, for the same steps.
"""

from dpkd.models.network import Network
from dpkd.models.settings import MeanPooling
from dpkd.objectives.supervised import Supervised
from dpkd.settings import DistillSettings, StudentSettings
from dpkd.stages.run import Run, TrainingSet, supervision, training_set
from dpkd.stages.teach import followed_teachers, frozen
from dpkd.stages.training import Stage, make_learner, network_spec, new_network, teacher_network
from dpkd.train.task import Learner, Predictor, Task


def distill(run: Run) -> None:
    """Trains all students and baselines, going on from the newest checkpoint, and saves their weights."""
    settings = run.settings.distill
    objectives = [objective for student in settings.students.values() for objective in student.objectives]
    data = training_set(run, settings.training, objectives)
    total_steps = settings.training.num_steps(data.num_samples)
    followed = followed_teachers(objectives, run.settings.teachers)
    learning = [name for name, teacher in run.settings.teachers.items() if teacher.during_distill != "frozen"]
    networks = {name: teacher_network(run, name) for name in dict.fromkeys([*followed, *learning])}
    learners: dict[str, Learner] = {}
    teachers: dict[str, Predictor] = {}
    for name, network in networks.items():
        teacher = run.settings.teachers[name]
        if teacher.during_distill == "frozen":
            teachers[name] = frozen(run, name, network, settings.training)
            continue
        learners[name] = make_learner(
            run, network, settings=teacher, training=settings.training, total_steps=total_steps
        )
        if teacher.during_distill == "ema":
            teachers[name] = learners[name]
    learners |= _students(run, networks, data, settings, total_steps=total_steps)
    task = Task(
        learners,
        teachers=teachers,
        live_teachers=[name for name in networks if name not in teachers],
        supervision=supervision(run, data),
        seed=run.seed,
    )
    Stage(run, task, data, "distill", settings.training, settings.augment).execute(folder_of=run.folder.network)


def _students(
    run: Run, teachers: dict[str, Network], data: TrainingSet, settings: DistillSettings, *, total_steps: int
) -> dict[str, Learner]:
    """Students and baselines as learners, by `student-<name>` and `baseline-<name>`."""
    learners = {}
    for place, (name, student) in enumerate(settings.students.items(), start=1):
        variants = {f"student-{name}": student}
        if student.baseline:
            variants[f"baseline-{name}"] = on_labels_alone(student)
        for key, variant in variants.items():
            spec = network_spec(run, data, variant.model, variant.objectives, teachers=teachers)
            network = new_network(run, spec, place=place, weights=variant.weights)
            learners[key] = make_learner(
                run, network, settings=variant, training=settings.training, total_steps=total_steps
            )
    return learners


def on_labels_alone(student: StudentSettings) -> StudentSettings:
    """The same student with mean pooling and its supervised loss alone (plain cross-entropy where it has none)."""
    supervised = tuple(
        objective.model_copy(update={"weight": 1.0})
        for objective in student.objectives
        if isinstance(objective, Supervised)
    )
    model = student.model.model_copy(update={"pooling": MeanPooling()})
    return student.model_copy(update={"model": model, "objectives": supervised or (Supervised(),)})
