"""Prior maps as weak knowledge about masks: classes change at edges, and what is salient is figure.

Axes: B sample, K class, H W cells of the network.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from dpkd.objectives.base import Context, Needs, Objective, Weight

if TYPE_CHECKING:
    from torch import Tensor


class MaskSmoothness(Objective):
    """Cells between which there is no edge should have the same classes (Leung and Malik 1998: intervening contour).

    `w ‖p_i − p_j‖²` with `w = exp(−max E / scale)`, E the map `edge` on the line from cell i to cell j.
    """

    kind: Literal["mask_smoothness"] = "mask_smoothness"
    weight: Weight = 0.1
    scale: float = Field(0.1, gt=0)
    distances: tuple[int, ...] = Field((1, 2, 4), min_length=1)
    """Distances in cells of the network between i and j, along both axes."""

    def needs(self) -> Needs:
        return Needs(student=("segmentation",), maps=("edge",), amounts=("edge",))

    def loss(self, context: Context) -> Tensor:
        probability_BKHW = context.student("segmentation").float().softmax(1)
        return self.weight * mask_smoothness(
            probability_BKHW, context.map("edge"), scale=self.scale, distances=self.distances
        )


def mask_smoothness(p_BKHW: Tensor, edge_B1HW: Tensor, *, scale: float, distances: tuple[int, ...]) -> Tensor:
    """The mean over the pairs of cells, then over axes, distances and images; images without the map count 0."""
    import torch
    import torch.nn.functional as F

    known_B1HW = torch.where(edge_B1HW.isnan(), torch.inf, edge_B1HW)  # weight 0 between cells of an unknown map
    edge_B1HW = F.adaptive_max_pool2d(known_B1HW, (p_BKHW.shape[2], p_BKHW.shape[3]))
    losses = []
    for dim in (2, 3):
        for distance in distances:
            if (length := p_BKHW.shape[dim] - distance) <= 0:
                continue
            window = (distance + 1, 1) if dim == 2 else (1, distance + 1)
            weight_B1HW = (-F.max_pool2d(edge_B1HW, window, stride=1) / scale).exp()
            change_BKHW = p_BKHW.narrow(dim, distance, length) - p_BKHW.narrow(dim, 0, length)
            losses.append((weight_B1HW * change_BKHW.square().sum(1, keepdim=True)).mean())
    return torch.stack(losses).mean()


class MaskSaliency(Objective):
    """Cross-entropy for figure where the map `saliency` is high and for ground where it is low, of images without mask.

    For masks of figure and ground.
    """

    kind: Literal["mask_saliency"] = "mask_saliency"
    low: float = Field(0.2, ge=0, le=1)
    """The map up to which a cell is ground."""
    high: float = Field(0.8, ge=0, le=1)
    """The map from which a cell is figure."""

    @model_validator(mode="after")
    def _in_order(self) -> MaskSaliency:
        if self.low >= self.high:
            raise ValueError(f"low={self.low:g} must be less than high={self.high:g}")
        return self

    def needs(self) -> Needs:
        return Needs(student=("segmentation",), targets=("mask",), maps=("saliency",), amounts=("saliency",))

    def loss(self, context: Context) -> Tensor:
        hidden_B = context.batch.targets["mask"] < 0
        logits_B2HW, saliency_B1HW = context.student("segmentation"), context.map("saliency")
        return self.weight * mask_saliency(logits_B2HW, saliency_B1HW, hidden_B, low=self.low, high=self.high)


def mask_saliency(logits_B2HW: Tensor, saliency_B1HW: Tensor, hidden_B: Tensor, *, low: float, high: float) -> Tensor:
    """The mean over all cells and images; cells between `low` and `high`, unknown ones and images with a mask are 0."""
    import torch
    import torch.nn.functional as F

    from dpkd.models.resample import area_resample

    assert logits_B2HW.shape[1] == 2, "saliency is of figure and ground"
    saliency_BHW = area_resample(saliency_B1HW, (logits_B2HW.shape[2], logits_B2HW.shape[3]))[:, 0]
    counts_BHW = ((saliency_BHW <= low) | (saliency_BHW >= high)) & hidden_B[:, None, None]
    loss_BHW = F.cross_entropy(logits_B2HW.float(), (saliency_BHW >= high).long(), reduction="none")
    return torch.where(counts_BHW, loss_BHW, 0.0).mean()
