"""The baselines of the students: the same networks, trained on labels alone, which show what distillation gave."""

from typing import Any, NamedTuple

from dpkd.models.settings import MeanPooling
from dpkd.objectives import AnyObjective
from dpkd.objectives.multi_label import MultiLabel
from dpkd.objectives.supervised import Supervised
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
    found, training = {}, settings.distill.training
    for name, student in settings.distill.students.items():
        for kind in student.baseline:
            length, ending = (1.0, ".plain") if kind == "plain" else (kind, "" if kind == 1 else f".x{kind:g}")
            objectives = labels_alone(settings, student)
            changes: dict[str, Any] = {"labelled_share": 1.0, "epochs": training.epochs and length * training.epochs}
            changes["steps"] = training.steps and max(1, round(length * training.steps))
            if kind == "plain":
                changes |= {"imbalance": "none", "sampling": "auto"}
                plain: dict[str, AnyObjective] = {
                    "supervised": Supervised(balance="none"),
                    "multi_label": MultiLabel(balance="none"),
                }
                objectives = tuple(plain.get(objective.kind, objective) for objective in objectives)
            baseline = TeacherSettings(
                model=student.model.model_copy(update={"pooling": MeanPooling()}),
                weights=student.weights,
                objectives=objectives,
                optimizer=student.optimizer,
                schedule=student.schedule,
                engine=student.engine,
                augment=settings.distill.augment,
                training=training.model_copy(update=changes),
            )
            found[name + ending] = Baseline(name, baseline)
    return found


def labels_alone(settings: Settings, student: StudentSettings) -> tuple[AnyObjective, ...]:
    """The objectives of a student on labels and masks with weight 1, or plain cross-entropy."""
    of_labels = ("supervised", "multi_label", "segmentation")
    supervised = [objective for objective in student.objectives if objective.kind in of_labels]
    several = any(objective.kind.startswith("multi_label") for objective in settings.objectives.values())
    plain = MultiLabel() if several else Supervised()
    return tuple(objective.model_copy(update={"weight": 1.0}) for objective in supervised or [plain])
