"""Learns an expert's class attributes: predicts attributes from the embedding, and scores classes by them.

Lampert et al. 2014 (direct attribute prediction), Akata et al. 2013 (ALE: the score of a class is a bilinear form of
image and attributes), Koh et al. 2020 (concept bottleneck: joint learning of attributes and classes).
Axes: B sample, A attribute, K class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from dpkd.objectives.base import Context, Head, Needs, Objective, Weight
from dpkd.objectives.supervised import supervised

if TYPE_CHECKING:
    from torch import Tensor


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
