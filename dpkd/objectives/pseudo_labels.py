"""Pseudo-labels: a strongly changed image keeps the class that the network is sure of (FixMatch, Sohn et al. 2020).

Axes: B sample, C channel, H W height and width, K class, R rows of the strong view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from dpkd.objectives.base import Context, Derived, DerivedView, Draw, Needs, Objective

if TYPE_CHECKING:
    from torch import Tensor

TURN, SHEAR, SHIFT = 0.5, 0.3, 0.25
"""Largest turn in radians, shear, and shift as a share of the image, as in RandAugment (Cubuk et al. 2020)."""
COLOUR, HOLE = 0.9, 0.5
"""Largest change of contrast, colour and brightness, and the side of the hole as a share of the image (cutout)."""


@dataclass(frozen=True)
class Strong(DerivedView):
    """Images that are turned, sheared, shifted, recoloured, and lack a square; the amounts are drawn for each image.

    A map that weighs patches moves with its image. Facts: the affine map `place` R23, and `seen` R1HW, 0 in the square.
    """

    magnitude: float
    share: float

    def derive(self, inputs: Sequence[Tensor], draw: Draw) -> Derived:
        import torch
        import torch.nn.functional as F

        from dpkd.objectives.draws import STRONG, uniform

        index_R = draw.first(self.share)
        drawn = [uniform(index_R, step=draw.step, seed=draw.seed, stream=STRONG + number) for number in range(9)]
        amounts = [(self.magnitude * (2 * each - 1)).to(inputs[0].dtype) for each in drawn]
        turn_R, shear_R, right_R, down_R, contrast_R, colour_R, brightness_R = amounts[:7]
        turn_R, across_R = TURN * turn_R, SHEAR * shear_R
        rows = [
            [turn_R.cos(), across_R * turn_R.cos() - turn_R.sin(), 2 * SHIFT * right_R],
            [turn_R.sin(), across_R * turn_R.sin() + turn_R.cos(), 2 * SHIFT * down_R],
        ]
        place_R23 = torch.stack([torch.stack(row, 1) for row in rows], 1)
        moved = []
        for part in inputs:
            part_RCHW = part[: len(index_R)]
            grid_RHW2 = F.affine_grid(place_R23, list(part_RCHW.shape), align_corners=False)
            moved.append(F.grid_sample(part_RCHW, grid_RHW2.to(part.dtype), align_corners=False))
        image_RCHW = moved[0]
        contrast_R111, colour_R111, brightness_R111 = (
            COLOUR * each[:, None, None, None] for each in (contrast_R, colour_R, brightness_R)
        )
        grey_R1HW = image_RCHW.mean(1, keepdim=True)
        image_RCHW = grey_R1HW + (1 + colour_R111) * (image_RCHW - grey_R1HW)
        mean_R111 = image_RCHW.mean((1, 2, 3), keepdim=True)
        image_RCHW = mean_R111 + (1 + contrast_R111) * (image_RCHW - mean_R111) + brightness_R111
        seen_R1HW = _outside_of_holes(image_RCHW, *drawn[7:], side=HOLE * self.magnitude)
        return Derived([image_RCHW * seen_R1HW, *moved[1:]], {"place": place_R23, "seen": seen_R1HW})


def _outside_of_holes(image_RCHW: Tensor, top_R: Tensor, left_R: Tensor, *, side: float) -> Tensor:
    """1 outside and 0 inside a square whose centre, as a share of the image, is drawn; R1HW."""
    import torch

    inside = []
    for length, centre_R in zip(image_RCHW.shape[2:], (top_R, left_R), strict=True):
        place_N = (torch.arange(length, device=image_RCHW.device) + 0.5) / length
        inside.append((place_N - centre_R[:, None]).abs() < side / 2)
    return 1 - (inside[0][:, None, :, None] & inside[1][:, None, None, :]).to(image_RCHW.dtype)


class PseudoLabels(Objective):
    """Cross-entropy of strongly changed images for the class that the network itself is sure of on the global view.

    Images of which it is less sure do not count, labelled or not; the mean is over all images of the strong view.
    """

    kind: Literal["pseudo_labels"] = "pseudo_labels"
    threshold: float = Field(0.95, ge=0, lt=1)
    """Least probability of the class."""
    magnitude: float = Field(1.0, ge=0, le=1)
    """Strength of the changes: 0 for none, 1 for those of RandAugment and cutout."""
    share: float = Field(1.0, gt=0, le=1)
    """Share of the images of a micro-batch; each is one more image in the forward pass."""

    def needs(self) -> Needs:
        return Needs(student=("logits",), targets=("class",), derived=(Strong(self.magnitude, self.share),))

    def loss(self, context: Context) -> Tensor:
        import torch.nn.functional as F

        strong_RK = context.student("logits", view=Strong(self.magnitude, self.share).name).float()
        weak_RK = context.student("logits")[: len(strong_RK)].detach().float()
        sure_R, label_R = weak_RK.softmax(1).max(1)
        loss_R = F.cross_entropy(strong_RK, label_R, reduction="none")
        return self.weight * (loss_R * (sure_R >= self.threshold)).mean()
