"""Losses where an image may have several labels: on visible labels, and of a teacher's. Axes: B sample, K label."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from dpkd.objectives.base import Context, Distillation, Needs, Objective

if TYPE_CHECKING:
    from torch import Tensor


class MultiLabel(Objective):
    """Binary cross-entropy on each visible label, asymmetric if asked for (Ridnik et al. 2021); others do not count."""

    kind: Literal["multi_label"] = "multi_label"
    gamma_positive: float = Field(0.0, ge=0)
    """Focus on labels that an image has and the network doubts; 0 for plain cross-entropy."""
    gamma_negative: float = Field(0.0, ge=0)
    """Focus on labels that an image lacks and the network suspects; above the other where few images have a label."""
    clip: float = Field(0.0, ge=0, lt=1)
    """Probability below which a label that an image lacks does not count."""
    balance: Literal["auto", "none", "logit_adjusted"] = "auto"
    """`logit_adjusted` adds the logarithm of each label's odds to its logit (Menon et al. 2021): for rare labels.

    `auto` does as `training.imbalance` says.
    """

    def needs(self) -> Needs:
        return Needs(student=("logits",), targets=("labels",))

    def loss(self, context: Context) -> Tensor:
        known_share_K, recipe = context.supervision.known_share_K, context.supervision.recipe
        assert known_share_K is not None, "data of several labels have shares of known ones"
        logits_BK = context.student("logits").float()
        if (recipe if self.balance == "auto" else self.balance) == "logit_adjusted":
            logits_BK = logits_BK + context.supervision.log_prior_K
        return self.weight * multi_label(
            logits_BK,
            context.batch.targets["labels"],
            known_share_K=known_share_K,
            gamma_positive=self.gamma_positive,
            gamma_negative=self.gamma_negative,
            clip=self.clip,
        )


def multi_label(
    logits_BK: Tensor,
    label_BK: Tensor,
    *,
    known_share_K: Tensor,
    gamma_positive: float = 0.0,
    gamma_negative: float = 0.0,
    clip: float = 0.0,
) -> Tensor:
    """The asymmetric loss of the labels 1 and 0, summed, over the expected number of known ones; a scalar.

    -1 does not count. With p = sigmoid(logit) and q = max(p - clip, 0): `-(1 - p)^gamma_positive log p` for a 1, and
    `-q^gamma_negative log(1 - q)` for a 0 (Ridnik et al. 2021, equations 5 to 7). The division by the expected number
    makes the mean over micro-batches independent of the cut of the batch.
    """
    import torch.nn.functional as F

    probability_BK = logits_BK.sigmoid()
    positive_BK = -F.logsigmoid(logits_BK) * (1 - probability_BK) ** gamma_positive
    if clip:
        shifted_BK = (probability_BK - clip).clamp(min=0)
        negative_BK = -(1 - shifted_BK).clamp(min=1e-7).log() * shifted_BK**gamma_negative
    else:
        negative_BK = -F.logsigmoid(-logits_BK) * probability_BK**gamma_negative
    total = (positive_BK * (label_BK == 1)).sum() + (negative_BK * (label_BK == 0)).sum()
    return total / (len(label_BK) * known_share_K.sum())


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
