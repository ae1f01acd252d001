"""Segmentation from a few masks, and its distillation. Axes: B sample, K class, H W cells of the map or the network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from dpkd.objectives.base import Context, Distillation, Head, Needs, Objective, Weight

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
