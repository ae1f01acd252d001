"""Masked prior prediction: predicts prior maps from features of a partly hidden view (MaskFeat, Wei et al. 2022).

Axes: B sample, C channel, H W height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from dpkd.data.settings import GLOBAL
from dpkd.objectives.base import Context, Derived, DerivedView, Draw, Head, Needs, Objective, Weight

if TYPE_CHECKING:
    from torch import Tensor

SPREAD_FLOOR = 0.05
"""Added to a map's standard deviation, so that a flat map is not amplified to noise."""


@dataclass(frozen=True)
class HiddenPatches(DerivedView):
    """The images with the mean colour in a ratio of their patches; `mask` is bool B1HW on the patch grid."""

    ratio: float
    share: float = 1.0

    def derive(self, inputs: Sequence[Tensor], draw: Draw) -> Derived:
        from dpkd.objectives.draws import hide_patches, random_patch_mask

        image_BCHW, *weights = inputs
        mask_B1HW = random_patch_mask(draw.index_B, step=draw.step, grid=draw.grid, ratio=self.ratio, seed=draw.seed)
        return Derived([hide_patches(image_BCHW, mask_B1HW), *weights], {"mask": mask_B1HW})


class MaskedPrior(Objective):
    """Predicts prior maps from the patch features of a partly masked view (MaskFeat, Wei et al. 2022)."""

    kind: Literal["masked_prior"] = "masked_prior"
    mask_ratio: float = Field(0.4, ge=0, lt=1)
    """Share of hidden patches; 0 predicts the maps of the whole view, without a second view."""
    targets: dict[str, Weight] = Field({"hog": 1.0}, min_length=1)
    """Weight of each predicted prior map; `hog` needs no prepared map."""

    def needs(self) -> Needs:
        heads = {f"prior/{name}": Head("patch", f"map.{name}") for name in self.targets}
        derived = (HiddenPatches(self.mask_ratio),) if self.mask_ratio else ()
        return Needs(heads=heads, maps=tuple(self.targets), derived=derived)

    def loss(self, context: Context) -> dict[str, Tensor]:
        view = HiddenPatches(self.mask_ratio).name if self.mask_ratio else GLOBAL
        mask_B1HW = context.facts[view]["mask"] if self.mask_ratio else None
        losses = {}
        for name, weight in self.targets.items():
            prediction_BCHW = context.student(f"prior/{name}", view=view)
            target_BCHW = prior_target(context.map(name), (prediction_BCHW.shape[2], prediction_BCHW.shape[3]))
            losses[name] = self.weight * weight * masked_prior(prediction_BCHW, target_BCHW, mask_B1HW)
        return losses


def prior_target(map_BCHW: Tensor, grid: tuple[int, int]) -> Tensor:
    """The map averaged over each patch, then standardised over the grid for each sample and channel; float32."""
    from dpkd.models.resample import area_resample

    target_BCHW = area_resample(map_BCHW, grid)
    spread_BC11 = target_BCHW.std((2, 3), keepdim=True, correction=0)
    return (target_BCHW - target_BCHW.mean((2, 3), keepdim=True)) / (spread_BC11 + SPREAD_FLOOR)


def masked_prior(prediction_BCHW: Tensor, target_BCHW: Tensor, mask_B1HW: Tensor | None = None) -> Tensor:
    """Mean squared error over the hidden patches, over all patches without a mask; a scalar.

    An unknown target (NaN) has an error of 0, so the mean does not depend on the cut of the batch.
    """
    import torch

    prediction_BCHW = prediction_BCHW.float()
    known_BCHW = torch.where(target_BCHW.isnan(), prediction_BCHW.detach(), target_BCHW)
    error_B1HW = (prediction_BCHW - known_BCHW).square().mean(1, keepdim=True)
    if mask_B1HW is None:
        return error_B1HW.mean()
    hidden_B1HW = mask_B1HW.to(error_B1HW.dtype)
    return (error_B1HW * hidden_B1HW).sum() / hidden_B1HW.sum().clamp(min=1)
