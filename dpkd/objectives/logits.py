"""Distillation of logits. Axes: B sample, K class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from dpkd.objectives.base import Context, Distillation, Needs

if TYPE_CHECKING:
    from torch import Tensor


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
