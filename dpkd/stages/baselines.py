"""The baselines of the students: the same networks, trained on labels alone, which show what distillation gave."""

from typing import NamedTuple

from dpkd.models.settings import MeanPooling
from dpkd.objectives import AnyObjective
from dpkd.objectives.supervised import MultiLabel, Supervised
from dpkd.settings import Settings, StudentSettings, TeacherSettings


class Baseline(NamedTuple):
    """One training of a student's network on labels alone."""

    student: str
    settings: TeacherSettings


def baselines(settings: Settings) -> dict[str, Baseline]:
    """The baselines by name: `<student>`, `<student>.x0.5` with half of the student's steps, or `<student>.plain`.

    Each has the student's model with mean pooling, weights, optimizer, schedule, engine and augmentation, and the
    supervised losses of the student with weight 1, or plain cross-entropy. All samples of its batches are labelled, or
    with `data.masks` have a mask. `plain` has plain cross-entropy and no recipe for rare classes.
    """
    found = {}
    for name, student in settings.distill.students.items():
        for length in student.baseline:
            if length == "plain":
                plain = _on_labels_alone(settings, student, 1.0)
                without = plain.training.model_copy(update={"imbalance": "none", "sampling": "auto"})
                of_labels = {"supervised": Supervised(balance="none"), "multi_label": MultiLabel(balance="none")}
                objectives = tuple(of_labels.get(objective.kind, objective) for objective in plain.objectives)
                update = {"objectives": objectives, "training": without}
                found[f"{name}.plain"] = Baseline(name, plain.model_copy(update=update))
            else:
                key = name if length == 1 else f"{name}.x{length:g}"
                found[key] = Baseline(name, _on_labels_alone(settings, student, length))
    return found


def _on_labels_alone(settings: Settings, student: StudentSettings, length: float) -> TeacherSettings:
    training = settings.distill.training
    steps = training.steps and max(1, round(length * training.steps))
    scaled = {"steps": steps, "epochs": training.epochs and length * training.epochs, "labelled_share": 1.0}
    return TeacherSettings(
        model=student.model.model_copy(update={"pooling": MeanPooling()}),
        weights=student.weights,
        objectives=labels_alone(settings, student),
        optimizer=student.optimizer,
        schedule=student.schedule,
        engine=student.engine,
        augment=settings.distill.augment,
        training=training.model_copy(update=scaled),
    )


def labels_alone(settings: Settings, student: StudentSettings) -> tuple[AnyObjective, ...]:
    """The objectives of a student on labels and masks with weight 1, or plain cross-entropy."""
    of_labels = ("supervised", "multi_label", "segmentation")
    supervised = [objective for objective in student.objectives if objective.kind in of_labels]
    several = any(objective.kind.startswith("multi_label") for objective in settings.objectives.values())
    plain = MultiLabel() if several else Supervised()
    return tuple(objective.model_copy(update={"weight": 1.0}) for objective in supervised or [plain])
