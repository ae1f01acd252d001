"""Decoupled distillation of logits: target class and other classes separately. Axes: B sample, K class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from dpkd.objectives.base import Context, Distillation, Needs

if TYPE_CHECKING:
    from torch import Tensor

HIDDEN = 1000.0
"""Subtracted from the target's logit, so that the target has no share among the other classes."""


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
