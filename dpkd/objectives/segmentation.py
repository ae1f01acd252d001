"""Segmentation: from a few masks, from a teacher, from strongly changed images and from prior maps.

Axes: B sample, R images of the strong view, K class, H W cells of the map or the network.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from dpkd.objectives.base import Context, Distillation, Head, Needs, Objective, Weight
from dpkd.objectives.changed_images import Strong

if TYPE_CHECKING:
    from torch import Tensor


class Segmentation(Objective):
    """Cross-entropy and Dice loss of the output `segmentation` on the visible masks; other images do not count.

    It gives the network that output: a head on layers of several strides. With weight 0 it gives the head alone.
    """

    kind: Literal["segmentation"] = "segmentation"
    control: Literal["none"] = "none"
    dice: Weight = 1.0
    """Weight of the Dice loss beside cross-entropy."""
    finest: int = Field(4, ge=1)
    """Smallest stride in pixels of the layers that the head reads; it predicts at the stride of the first of them."""
    hidden: int = Field(64, ge=1)
    """Channels of the head."""

    def needs(self) -> Needs:
        head = Head(f"pyramid-{self.finest}", "masks", hidden=self.hidden)
        return Needs(heads={"segmentation": head}, maps=("mask",), targets=("mask",))

    def loss(self, context: Context) -> dict[str, Tensor]:
        cross_entropy, dice = segmentation(
            context.student("segmentation"),
            context.map("mask"),
            visible_B=context.batch.targets["mask"] >= 0,
            masked_share=context.supervision.masked_share,
        )
        return {"cross_entropy": self.weight * cross_entropy, "dice": self.weight * self.dice * dice}


def segmentation(
    logits_BKHW: Tensor, share_BKHW: Tensor, *, visible_B: Tensor, masked_share: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(cross-entropy, Dice loss) on the shares of the classes in each cell, of any size; scalars.

    Logits are enlarged bilinearly to the cells. Cross-entropy is the mean over an image's cells, weighted by the part
    of a cell that has a class. The Dice loss is `1 - (2 Σ p s + 1) / (Σ p + Σ s + 1)`, mean over classes (Milletari et
    al. 2016, without squares). Each is summed over the images that are `visible_B` and known (not NaN), and divided by
    `B * masked_share`, so that the mean over micro-batches does not depend on the cut of the batch.
    """
    import torch
    import torch.nn.functional as F

    size = (share_BKHW.shape[2], share_BKHW.shape[3])
    log_p_BKHW = F.interpolate(logits_BKHW.float(), size=size, mode="bilinear").log_softmax(1)
    counts_B = visible_B & ~share_BKHW.isnan().flatten(1).any(1)
    share_BKHW = torch.where(counts_B[:, None, None, None], share_BKHW, 0.0)
    known_B1HW = share_BKHW.sum(1, keepdim=True)
    cross_entropy_B = -(share_BKHW * log_p_BKHW).sum((1, 2, 3)) / known_B1HW.sum((1, 2, 3)).clamp(min=1e-6)
    p_BKHW = log_p_BKHW.exp() * known_B1HW
    overlap_BK = 2 * (p_BKHW * share_BKHW).sum((2, 3)) + 1
    dice_B = (1 - overlap_BK / (p_BKHW.sum((2, 3)) + share_BKHW.sum((2, 3)) + 1)).mean(1)
    total = len(visible_B) * masked_share
    return cross_entropy_B.sum() / total, (dice_B * counts_B).sum() / total


class MaskDistillation(Distillation):
    """`temperature² · KL(teacher ‖ student)` of the classes of each cell, on all images (Hinton et al. 2015)."""

    kind: Literal["mask_logits"] = "mask_logits"
    temperature: float = Field(1.0, gt=0)

    def needs(self) -> Needs:
        return Needs(student=("segmentation",), teacher=("segmentation",))

    def loss(self, context: Context) -> Tensor:
        student_BKHW, teacher_BKHW = context.student("segmentation"), context.teacher("segmentation")
        return self.weight * distil_masks(student_BKHW, teacher_BKHW, temperature=self.temperature)


def distil_masks(student_BKHW: Tensor, teacher_BKHW: Tensor, *, temperature: float) -> Tensor:
    """`temperature² · KL(teacher ‖ student)` of softened classes, mean over cells and images; a scalar.

    The student's logits are resized to the teacher's cells.
    """
    import torch.nn.functional as F

    size = (teacher_BKHW.shape[2], teacher_BKHW.shape[3])
    student_BKHW = F.interpolate(student_BKHW.float(), size=size, mode="bilinear")
    log_s_BKHW = (student_BKHW / temperature).log_softmax(1)
    log_t_BKHW = (teacher_BKHW.float() / temperature).log_softmax(1)
    return temperature**2 * F.kl_div(log_s_BKHW, log_t_BKHW, reduction="none", log_target=True).sum(1).mean()


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

    UniMatch V2 (Yang et al. 2025). `place_R23` is the affine map by which the strong images were moved. A cell counts
    if its class is sure, and if its centre is inside of the weak image and of what the network has seen.
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
