"""Distillation of standardised logits. Axes: B sample, K class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from dpkd.objectives.base import Context, Distillation, Needs
from dpkd.objectives.logits import distil_logits

if TYPE_CHECKING:
    from torch import Tensor


class StandardisedLogits(Distillation):
    """Distillation of logits with mean 0 and variance 1 in each sample (Sun et al. 2024)."""

    kind: Literal["standardised_logits"] = "standardised_logits"
    weight: float = Field(9.0, ge=0)
    temperature: float = Field(2.0, gt=0)
    average_views: bool = False
    """Learns from all global views, with targets that are half the mean over the views of an image."""

    def needs(self) -> Needs:
        return Needs(student=("logits",), teacher=("logits",), num_views=2 if self.average_views else 1, one_class=True)

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
