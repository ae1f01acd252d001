"""Objectives on changed images: their turn, the classes of mixed ones, and sure classes that strong changes keep.

Axes: B sample, C channel, H W height and width, K class, R rows of the changed view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from dpkd.objectives.base import Context, Derived, DerivedView, Draw, Head, Needs, Objective
from dpkd.objectives.supervised import Supervised

if TYPE_CHECKING:
    from torch import Tensor

HEAD = "rotation"
TURN, SHEAR, SHIFT = 0.5, 0.3, 0.25
"""Largest turn in radians, shear, and shift as a share of the image, as in RandAugment (Cubuk et al. 2020)."""
COLOUR, HOLE = 0.9, 0.5
"""Largest change of contrast, colour and brightness, and the side of the hole as a share of the image (cutout)."""


@dataclass(frozen=True)
class Turned(DerivedView):
    """A share of the images, each turned by 0, 90, 180 or 270 degrees; `turn` is int64 R, in quarters."""

    share: float

    def derive(self, inputs: Sequence[Tensor], draw: Draw) -> Derived:
        from dpkd.objectives.draws import TURNS, uniform

        turn_R = (4 * uniform(draw.first(self.share), step=draw.step, seed=draw.seed, stream=TURNS)).long()
        return Derived([turned(part[: len(turn_R)], turn_R) for part in inputs], {"turn": turn_R})


class Rotation(Objective):
    """Cross-entropy of the turn of an image, from its embedding (in few-shot learning: Gidaris et al. 2019; S2M2)."""

    kind: Literal["rotation"] = "rotation"
    share: float = Field(1.0, gt=0, le=1)
    """Share of the images of a micro-batch that are turned; each is one more image in the forward pass."""

    def needs(self) -> Needs:
        return Needs(heads={HEAD: Head("embedding", 4)}, derived=(Turned(self.share),))

    def loss(self, context: Context) -> Tensor:
        import torch.nn.functional as F

        view = Turned(self.share).name
        return self.weight * F.cross_entropy(context.student(HEAD, view=view), context.facts[view]["turn"])


def turned(image_BCHW: Tensor, turn_B: Tensor) -> Tensor:
    """The square images, each turned by its number of quarters (int64 B) against the clock, pixel by pixel."""
    import torch

    assert image_BCHW.shape[2] == image_BCHW.shape[3], "a turn keeps the shape of squares alone"
    result_BCHW = image_BCHW
    for quarters in (1, 2, 3):
        chosen_B111 = (turn_B == quarters)[:, None, None, None]
        result_BCHW = torch.where(chosen_B111, torch.rot90(image_BCHW, quarters, (2, 3)), result_BCHW)
    return result_BCHW


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
