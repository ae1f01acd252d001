"""Losses on visible labels: of one class an image, of several labels, and of an expert's attributes of the classes.

Attributes: Lampert et al. 2014 (direct attribute prediction), Akata et al. 2013 (ALE: the score of a class is a
bilinear form of image and attributes), Koh et al. 2020 (concept bottleneck: joint learning of attributes and classes).
Axes: B sample, K class or label, A attribute.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from dpkd.objectives.base import Context, Head, Needs, Objective, Weight

if TYPE_CHECKING:
    from torch import Tensor


class Supervised(Objective):
    """Cross-entropy on the visible labels; samples without one do not count."""

    kind: Literal["supervised"] = "supervised"
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    balance: Literal["auto", "none", "logit_adjusted", "deferred"] = "auto"
    """`logit_adjusted` adds `tau * log(class prior)` to the logits (Menon et al. 2021); tau 1 is balanced softmax.

    `deferred` weighs rare classes up in the last fifth of the steps (Cao et al. 2019); `auto` does as
    `training.imbalance` says.
    """
    tau: float = Field(1.0, ge=0)

    def needs(self) -> Needs:
        return Needs(student=("logits",), targets=("class",))

    def loss(self, context: Context) -> Tensor:
        return self.weight * self.of_labels(context, context.student("logits"), context.batch.targets["class"])

    def of_labels(
        self, context: Context, logits_BK: Tensor, label_B: Tensor, *, weight_B: Tensor | None = None
    ) -> Tensor:
        """The balanced loss of these logits, without the objective's weight; `weight_B` is that of each sample."""
        facts = context.supervision
        balance = facts.recipe if self.balance == "auto" else self.balance
        if balance == "deferred" and context.step >= facts.deferred_from:
            assert facts.class_weight_K is not None, "supervision of a training has weights"
            class_weight_B = facts.class_weight_K[label_B.clamp(min=0)]
            weight_B = class_weight_B if weight_B is None else weight_B * class_weight_B
        return supervised(
            logits_BK,
            label_B,
            labelled_share=facts.labelled_share,
            label_smoothing=self.label_smoothing,
            log_prior_K=facts.log_prior_K if balance == "logit_adjusted" else None,
            tau=self.tau,
            weight_B=weight_B,
        )


def supervised(
    logits_BK: Tensor,
    label_B: Tensor,
    *,
    labelled_share: float = 1.0,
    label_smoothing: float = 0.0,
    log_prior_K: Tensor | None = None,
    tau: float = 1.0,
    weight_B: Tensor | None = None,
) -> Tensor:
    """Cross-entropy summed over the labelled samples (label >= 0), divided by `B * labelled_share`; a scalar.

    `labelled_share` is the expected share of labelled samples. The division by it, not by the number in this batch,
    makes the mean over micro-batches independent of the cut of the batch. `log_prior_K` adds `tau * log prior` to the
    logits (Menon et al. 2021, eq. 10; tau 1 is balanced softmax, Ren et al. 2020); `weight_B` multiplies the loss of
    each sample. Zero, with gradients, if no sample is labelled.
    """
    import torch.nn.functional as F

    assert labelled_share > 0, "supervised loss without a labelled sample in the split"
    if log_prior_K is not None:
        logits_BK = logits_BK + tau * log_prior_K
    loss_B = F.cross_entropy(
        logits_BK.float(), label_B, ignore_index=-1, reduction="none", label_smoothing=label_smoothing
    )
    total = (loss_B if weight_B is None else weight_B * loss_B).sum()
    return total / (len(label_B) * labelled_share)


def log_class_prior(count_K: Tensor) -> Tensor:
    """Logarithm of each class's share of the labels; K float32.

    A class without a label counts as half a sample, so the logarithm is finite.
    """
    count_K = count_K.double().clamp(min=0.5)
    return (count_K / count_K.sum()).log().float()


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


class Attributes(Objective):
    """Predicts from the embedding the attributes in `data.attributes` of each labelled sample's class."""

    kind: Literal["attributes"] = "attributes"
    classify: Weight = 0.0
    """Weight of cross-entropy over the trained classes, scored only by the predicted attributes."""

    def needs(self) -> Needs:
        return Needs(heads={"attributes": Head("embedding", "attributes")}, targets=("attributes",))

    def loss(self, context: Context) -> dict[str, Tensor]:
        table, share = context.supervision.attributes, context.supervision.labelled_share
        assert table is not None, "settings require a table of attributes"
        logit_BA, label_B = context.student("attributes"), context.batch.targets["class"]
        losses = {"predict": self.weight * predict_attributes(logit_BA, label_B, table.value_KA, labelled_share=share)}
        if self.classify:
            logit_BK = logit_BA.float() @ table.weight_KA.T + table.bias_K
            losses["classify"] = self.weight * self.classify * supervised(logit_BK, label_B, labelled_share=share)
        return losses


def predict_attributes(logit_BA: Tensor, label_B: Tensor, value_KA: Tensor, *, labelled_share: float = 1.0) -> Tensor:
    """Binary cross-entropy with the graded attributes of each labelled sample's class; a scalar.

    The sum over labelled samples (label >= 0) and known attributes (not NaN), divided by `B * labelled_share * A`. So
    every known value has the same weight, and the mean over micro-batches does not depend on the cut of the batch.
    Zero, with gradients, if no sample is labelled.
    """
    import torch
    import torch.nn.functional as F

    target_BA = value_KA[label_B.clamp(min=0)]
    known_BA = (label_B >= 0)[:, None] & ~target_BA.isnan()
    loss_BA = F.binary_cross_entropy_with_logits(
        logit_BA.float(), torch.where(known_BA, target_BA, 0.5), reduction="none"
    )
    num_samples, num_attributes = logit_BA.shape
    return (loss_BA * known_BA).sum() / (num_samples * labelled_share * num_attributes)
