"""Segmentation without masks: strongly changed images keep the classes that are sure (UniMatch V2, Yang et al. 2025).

Axes: R images of the strong view, K class, H W cells of the network.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from dpkd.objectives.base import Context, Distillation, Needs
from dpkd.objectives.pseudo_labels import Strong

if TYPE_CHECKING:
    from torch import Tensor


class MaskConsistency(Distillation):
    """Cross-entropy of each cell of strongly changed images for the class that is sure on the global view.

    The class is the network's own, or with `source: teacher` that of the teacher, and moves with the image.
    """

    kind: Literal["mask_consistency"] = "mask_consistency"
    threshold: float = Field(0.95, ge=0, lt=1)
    """Least probability of the class."""
    magnitude: float = Field(0.5, ge=0, le=1)
    """Strength of the changes: 0 for none, 1 for those of RandAugment and cutout."""
    share: float = Field(1.0, gt=0, le=1)
    """Share of the images of a micro-batch; each is one more image in the forward pass."""
    source: Literal["own", "teacher"] = "own"

    def needs(self) -> Needs:
        teacher = ("segmentation",) if self.source == "teacher" else ()
        return Needs(student=("segmentation",), teacher=teacher, derived=(Strong(self.magnitude, self.share),))

    def loss(self, context: Context) -> Tensor:
        view = Strong(self.magnitude, self.share).name
        weak = context.teacher if self.source == "teacher" else context.student
        strong_RKHW, facts = context.student("segmentation", view=view), context.facts[view]
        return self.weight * mask_consistency(
            weak("segmentation")[: len(strong_RKHW)],
            strong_RKHW,
            place_R23=facts["place"],
            seen_R1HW=facts["seen"],
            threshold=self.threshold,
        )


def mask_consistency(
    weak_RKHW: Tensor, strong_RKHW: Tensor, *, place_R23: Tensor, seen_R1HW: Tensor, threshold: float
) -> Tensor:
    """Cross-entropy on the likeliest class of the moved weak prediction, mean over all cells and images; a scalar.

    `place_R23` is the affine map by which the strong images were moved. A cell counts if its class is sure, and if its
    centre is inside of the weak image and of what the network has seen.
    """
    import torch
    import torch.nn.functional as F

    p_RKHW = weak_RKHW.detach().float().softmax(1)
    size = [*strong_RKHW.shape[:1], p_RKHW.shape[1], *strong_RKHW.shape[2:]]
    grid_RHW2 = F.affine_grid(place_R23.to(p_RKHW.dtype), size, align_corners=False)
    moved_RKHW = F.grid_sample(p_RKHW, grid_RHW2, align_corners=False, padding_mode="border")
    inside_RHW = (grid_RHW2.abs() <= 1).all(3)
    seen_RHW = F.interpolate(seen_R1HW.float(), size=size[2:], mode="nearest-exact")[:, 0] > 0
    sure_RHW, class_RHW = moved_RKHW.max(1)
    counts_RHW = inside_RHW & seen_RHW & (sure_RHW >= threshold)
    loss_RHW = F.cross_entropy(strong_RKHW.float(), class_RHW, reduction="none")
    return torch.where(counts_RHW, loss_RHW, 0.0).mean()
