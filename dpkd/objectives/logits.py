"""Distillation of logits: as they are, standardised, or the target class apart. Axes: B sample, K class or label."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from dpkd.objectives.base import Context, Distillation, Needs

if TYPE_CHECKING:
    from torch import Tensor

HIDDEN = 1000.0
"""Subtracted from the target's logit, so that the target has no share among the other classes."""


class LogitDistillation(Distillation):
    """`temperature² · KL(teacher ‖ student)` on softened logits (Hinton et al. 2015)."""

    kind: Literal["logits"] = "logits"
    temperature: float = Field(2.0, gt=0)
    average_views: bool = False
    """Learns from all global views, with targets that are half the mean over the views of an image."""

    def needs(self) -> Needs:
        return Needs(student=("logits",), teacher=("logits",), num_views=2 if self.average_views else 1, one_class=True)

    def loss(self, context: Context) -> Tensor:
        student_BK = context.student("logits", all_views=self.average_views)
        teacher_BK = context.teacher("logits", average_views=self.average_views)
        return self.weight * distil_logits(student_BK, teacher_BK, temperature=self.temperature)


def distil_logits(student_BK: Tensor, teacher_BK: Tensor, *, temperature: float) -> Tensor:
    """`temperature² · KL(teacher ‖ student)` of the softened class distributions, mean over samples; a scalar.

    Hinton et al. 2015, section 2: the square makes the gradient's size independent of the temperature.
    """
    import torch.nn.functional as F

    student_BK = F.log_softmax(student_BK.float() / temperature, dim=1)
    teacher_BK = F.log_softmax(teacher_BK.float() / temperature, dim=1)
    return temperature**2 * F.kl_div(student_BK, teacher_BK, reduction="batchmean", log_target=True)


class StandardisedLogits(LogitDistillation):
    """Distillation of logits with mean 0 and variance 1 in each sample (Sun et al. 2024)."""

    kind: Literal["standardised_logits"] = "standardised_logits"  # type: ignore[assignment]
    weight: float = Field(9.0, ge=0)

    def loss(self, context: Context) -> Tensor:
        student_BK = standardise_logits(context.student("logits", all_views=self.average_views))
        teacher_BK = standardise_logits(context.teacher("logits", average_views=self.average_views))
        return self.weight * distil_logits(student_BK, teacher_BK, temperature=self.temperature)


def standardise_logits(logits_BK: Tensor) -> Tensor:
    """`(l - mean l) / (std l + 1e-7)` of each sample over its K classes, float32, std with K - 1.

    Sun et al. 2024 (Logit Standardization in Knowledge Distillation), algorithm 1: the student matches the relations
    of the teacher's logits, not their size.
    """
    logits_BK = logits_BK.float()
    return (logits_BK - logits_BK.mean(1, keepdim=True)) / (logits_BK.std(1, keepdim=True) + 1e-7)


class DecoupledLogits(Distillation):
    """`alpha · TCKD + beta · NCKD` (Zhao et al. 2022); without a label, the target is the teacher's class."""

    kind: Literal["decoupled_logits"] = "decoupled_logits"
    alpha: float = Field(1.0, ge=0)
    """Weight of the target class against all other classes."""
    beta: float = Field(8.0, ge=0)
    """Weight of the distribution over the other classes."""
    temperature: float = Field(4.0, gt=0)

    def needs(self) -> Needs:
        return Needs(student=("logits",), teacher=("logits",), one_class=True)

    def loss(self, context: Context) -> Tensor:
        teacher_BK, label_B = context.teacher("logits"), context.batch.targets["class"]
        target_B = teacher_BK.argmax(1).where(label_B < 0, label_B)
        tckd, nckd = decoupled_logits(
            context.student("logits"), teacher_BK, target_B=target_B, temperature=self.temperature
        )
        return self.weight * (self.alpha * tckd + self.beta * nckd)


def decoupled_logits(
    student_BK: Tensor, teacher_BK: Tensor, *, target_B: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """(TCKD, NCKD), each `temperature²` times a KL divergence, mean over samples; scalars.

    Zhao et al. 2022 (Decoupled Knowledge Distillation), eq. 7. TCKD compares [p_target, 1 - p_target]. NCKD compares
    the distribution over the other classes, which a confident teacher would otherwise suppress.
    """
    import torch
    import torch.nn.functional as F

    hidden_BK = F.one_hot(target_B, student_BK.shape[1]).bool()
    binary, others = [], []
    for logits_BK in (student_BK.float() / temperature, teacher_BK.float() / temperature):
        log_p_BK = F.log_softmax(logits_BK, dim=1)
        target_B1 = log_p_BK.gather(1, target_B[:, None])
        rest_B1 = log_p_BK.masked_fill(hidden_BK, -torch.inf).logsumexp(1, keepdim=True)
        binary.append(torch.cat([target_B1, rest_B1], dim=1))
        others.append(F.log_softmax(logits_BK - HIDDEN * hidden_BK, dim=1))
    tckd, nckd = (
        F.kl_div(student, teacher, reduction="batchmean", log_target=True) for student, teacher in (binary, others)
    )
    return temperature**2 * tckd, temperature**2 * nckd


class MultiLabelDistillation(Distillation):
    """The teacher's probability of each label, softened: the mean over labels of binary KL (Yang et al. 2023)."""

    kind: Literal["multi_label_logits"] = "multi_label_logits"
    temperature: float = Field(1.0, gt=0)

    def needs(self) -> Needs:
        return Needs(student=("logits",), teacher=("logits",))

    def loss(self, context: Context) -> Tensor:
        student_BK, teacher_BK = context.student("logits"), context.teacher("logits")
        return self.weight * distil_labels(student_BK, teacher_BK, temperature=self.temperature)


def distil_labels(student_BK: Tensor, teacher_BK: Tensor, *, temperature: float) -> Tensor:
    """`temperature² · KL(teacher ‖ student)` of each label's softened probability, mean over samples and labels."""
    import torch.nn.functional as F

    student_BK, teacher_BK = student_BK.float() / temperature, teacher_BK.float() / temperature
    with_BK = teacher_BK.sigmoid() * (F.logsigmoid(teacher_BK) - F.logsigmoid(student_BK))
    without_BK = (-teacher_BK).sigmoid() * (F.logsigmoid(-teacher_BK) - F.logsigmoid(-student_BK))
    return temperature**2 * (with_BK + without_BK).mean()
