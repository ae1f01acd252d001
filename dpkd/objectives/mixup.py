"""Mixup and manifold mixup: cross-entropy of images whose pixels or features are mixed in pairs.

Axes: B sample, K class, R rows of the mixed view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from dpkd.objectives.base import Context, Derived, DerivedView, Draw, Needs
from dpkd.objectives.supervised import Supervised

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Mixed(DerivedView):
    """Images mixed with the previous one of the micro-batch, in pixels or after one of the first stages.

    The place is drawn for each step, the share for each image. Facts: `share` float R and `partner` int64 R, the row
    that has the rest.
    """

    alpha: int
    stages: int
    share: float

    def derive(self, inputs: Sequence[Tensor], draw: Draw) -> Derived:
        import torch

        from dpkd.models.backbone import LayerMix
        from dpkd.objectives.draws import LAYERS, MIXES, beta, uniform

        index_R = draw.first(self.share)
        inputs = [part[: len(index_R)] for part in inputs]
        share_R = beta(index_R, self.alpha, step=draw.step, seed=draw.seed, stream=MIXES).float()
        partner_R = torch.arange(len(index_R), device=index_R.device).roll(1)
        facts = {"share": share_R, "partner": partner_R}
        # on the CPU: the place is a number of this process
        place = uniform(torch.zeros(1, dtype=torch.int64), step=draw.step, seed=draw.seed, stream=LAYERS)
        stage = int(place * (self.stages + 1))
        if stage:
            return Derived(inputs, facts, LayerMix(stage, share_R, partner_R))
        share_R111 = share_R[:, None, None, None]
        return Derived([share_R111 * part + (1 - share_R111) * part[partner_R] for part in inputs], facts)


class Mixup(Supervised):
    """Cross-entropy of mixed images for both labels, each by its share (Zhang et al. 2018; Verma et al. 2019).

    The partner is the previous image of the micro-batch, so the loss depends on how a batch is cut. A label that is
    not visible does not count.
    """

    kind: Literal["mixup"] = "mixup"  # type: ignore[assignment]
    alpha: int = Field(1, ge=1)
    """The share of an image is drawn from Beta(alpha, alpha)."""
    stages: int = Field(0, ge=0)
    """0 mixes pixels; n mixes pixels or the features after one of the first n stages (manifold mixup)."""
    share: float = Field(1.0, gt=0, le=1)
    """Share of the images of a micro-batch that are mixed; each is one more image in the forward pass."""

    def needs(self) -> Needs:
        return Needs(student=("logits",), targets=("class",), derived=(Mixed(self.alpha, self.stages, self.share),))

    def loss(self, context: Context) -> Tensor:
        view = Mixed(self.alpha, self.stages, self.share).name
        facts = context.facts[view]
        share_R, partner_R = facts["share"], facts["partner"]
        logits_RK = context.student("logits", view=view)
        label_R = context.batch.targets["class"][: len(share_R)]
        own, other = (
            self.of_labels(context, logits_RK, label, weight_B=weight)
            for label, weight in ((label_R, share_R), (label_R[partner_R], 1 - share_R))
        )
        return self.weight * (own + other)
