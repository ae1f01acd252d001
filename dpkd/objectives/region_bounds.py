"""An expert's bounds on the statistics of a predicted region.

Constrained CNNs (Pathak et al. 2015) with the quadratic penalty of Kervadec et al. 2019 (size constraints), which is
differentiable and needs no label. The region is the sigmoid of a logit: a probability with a gradient everywhere. A
clamp has no gradient beyond 0 and 1, but bounds need it there. Axes: B sample, H W rows and columns of the grid.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from dpkd.config import Config
from dpkd.objectives.base import Context, Head, Needs, Objective

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST = 1e-6
"""Minimum total weight of a region, in cells: an empty region has no position or colour."""
FLAT = 1e-12
"""Added to squared gradients, so that the root is differentiable in flat parts of a region."""

XYZ_OF_RGB = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
"""Linear sRGB to CIE XYZ, D65."""
WHITE_XYZ = (0.950456, 1.0, 1.088754)

STATISTICS = {
    **dict.fromkeys(("area", "row", "column", "compactness", "red", "green", "blue"), (0.0, 1.0)),
    "lightness": (0.0, 100.0),
    "a": (-128.0, 128.0),
    "b": (-128.0, 128.0),
}
"""Statistics of a predicted region (defined in `region_statistic`), with the range of possible values."""
COLOURS = ("red", "green", "blue", "lightness", "a", "b")


class Bound(Config):
    """An expert's lower bound, upper bound or both for one statistic of a region."""

    statistic: Literal["area", "row", "column", "compactness", "red", "green", "blue", "lightness", "a", "b"]
    at_least: float | None = None
    at_most: float | None = None
    classes: tuple[str, ...] = ()
    """Applies to samples with a visible label of these classes; if empty, to all images, labelled or not."""

    @model_validator(mode="after")
    def _can_be_met(self) -> Bound:
        low, high = STATISTICS[self.statistic]
        for key, value in (("at_least", self.at_least), ("at_most", self.at_most)):
            if value is not None and not low <= value <= high:
                raise ValueError(f"{key} {value:g} is out of range: {self.statistic} is between {low:g} and {high:g}")
        if self.at_least is None and self.at_most is None:
            raise ValueError(f"the bound on {self.statistic} has no value: give at_least, at_most, or both")
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise ValueError(f"at_least {self.at_least:g} is above at_most {self.at_most:g}: no region can meet both")
        return self

    def penalty(self, value_B: Tensor) -> Tensor:
        """`max(0, at_least - V)² + max(0, V - at_most)²` of each sample, as shares of the statistic's range; B."""
        low, high = STATISTICS[self.statistic]
        penalty_B = value_B.new_zeros(len(value_B))
        if self.at_least is not None:
            penalty_B = penalty_B + ((self.at_least - value_B) / (high - low)).clamp(min=0).square()
        if self.at_most is not None:
            penalty_B = penalty_B + ((value_B - self.at_most) / (high - low)).clamp(min=0).square()
        return penalty_B


class RegionBounds(Objective):
    """Predicts a region from the patch features: similar to a prior map if it is known, and always within bounds.

    `weight` is the weight of the penalty on statistics out of bounds.
    """

    kind: Literal["region_bounds"] = "region_bounds"
    of: str
    """A prior map of one channel of amounts in [0, 1], such as `saliency` or `expert-mask`."""
    fit: float = Field(1.0, gt=0)
    """Weight of the cross-entropy between the region and the map."""
    bounds: tuple[Bound, ...] = Field(min_length=1)

    def needs(self) -> Needs:
        colours = [bound.statistic for bound in self.bounds if bound.statistic in COLOURS]
        return Needs(
            heads={f"region/{self.of}": Head("patch", 1)},
            maps=(self.of,),
            amounts=(self.of,),
            classes={f"bounds.{number}.classes": bound.classes for number, bound in enumerate(self.bounds)},
            own_colours=f"bounds {colours[0]}" if colours else None,
        )

    def loss(self, context: Context) -> dict[str, Tensor]:
        import torch

        logit_B1HW = context.student(f"region/{self.of}")
        losses = {"fit": self.fit * fit_region(logit_B1HW, context.map(self.of))}
        region_B1HW, image_BCHW = logit_B1HW.float().sigmoid(), context.image()
        label_B, class_names = context.batch.targets["class"], context.supervision.class_names
        for bound in self.bounds:
            penalty_B = bound.penalty(region_statistic(bound.statistic, region_B1HW, image_BCHW))
            if bound.classes:  # samples of other classes or without a label have no penalty
                bound_K = torch.tensor([class_names.index(name) for name in bound.classes], device=label_B.device)
                penalty_B = penalty_B * torch.isin(label_B, bound_K)
            losses[bound.statistic] = losses.get(bound.statistic, 0) + self.weight * penalty_B.mean()
        return losses


def fit_region(logit_B1HW: Tensor, map_B1HW: Tensor) -> Tensor:
    """Binary cross-entropy between the region and a prior map of any size, mean over samples and cells; a scalar.

    An unknown map (NaN) has a loss of 0, so the mean does not depend on the cut of the batch.
    """
    import torch
    import torch.nn.functional as F

    from dpkd.models.resample import area_resample

    map_B1HW = area_resample(map_B1HW, (logit_B1HW.shape[2], logit_B1HW.shape[3]))
    known_B1HW = ~map_B1HW.isnan()
    target_B1HW = torch.where(known_B1HW, map_B1HW.clamp(0, 1), 0.5)
    loss_B1HW = F.binary_cross_entropy_with_logits(logit_B1HW.float(), target_B1HW, reduction="none")
    return (loss_B1HW * known_B1HW).mean()


def region_statistic(name: str, region_B1HW: Tensor, image_BCHW: Tensor) -> Tensor:
    """A statistic of soft regions in [0, 1]; B, in the units of `STATISTICS`.

    `area` is the share of the view; `row` and `column` are the centre (0 top and left, 1 bottom and right);
    `compactness` is that function; `red`, `green`, `blue` in 0..1 and `lightness`, `a`, `b` of CIE L*a*b* (D65) are
    mean colours over the region of the uint8 RGB images, averaged to the grid.
    """
    import torch

    from dpkd.models.resample import area_resample

    region_BHW = region_B1HW.squeeze(1)
    if name == "area":
        return region_BHW.mean((1, 2))
    if name == "compactness":
        return compactness(region_BHW)
    height, width = region_BHW.shape[1:]
    weight_B = region_BHW.sum((1, 2)).clamp(min=SMALLEST)
    if name in ("row", "column"):
        size, dim = (height, 2) if name == "row" else (width, 1)
        position = (torch.arange(size, device=region_BHW.device) + 0.5) / size
        return (region_BHW.sum(dim) * position).sum(1) / weight_B
    rgb_B3HW = area_resample(image_BCHW, (height, width)) / 255
    planes_B3HW = rgb_B3HW if name in COLOURS[:3] else lab(rgb_B3HW)
    colour_BHW = planes_B3HW[:, COLOURS.index(name) % 3]
    return (region_BHW * colour_BHW).sum((1, 2)) / weight_B


def compactness(region_BHW: Tensor) -> Tensor:
    """`4π Σp² / (Σ|∇p|)²` of soft regions p; 4πA/P² if binary: near 1 for a disc, small if thin or many; B.

    With Σp² as the area, a factor on p does not change the value. By the isoperimetric inequality for functions
    (Federer & Fleming 1960), it is at most 1. Cells outside the frame are not in the region. Gradients use four cells:
    exact for edges along axes and diagonals, but each corner loses half a cell. So the value is too high for few cells:
    0.96 for 3 x 3 cells, 1.08 for 2 x 2, 1.57 for one.
    """
    import torch
    import torch.nn.functional as F

    padded_BHW = F.pad(region_BHW, (1, 1, 1, 1))
    upper_left, upper_right = padded_BHW[:, :-1, :-1], padded_BHW[:, :-1, 1:]
    lower_left, lower_right = padded_BHW[:, 1:, :-1], padded_BHW[:, 1:, 1:]
    across = (upper_right + lower_right - upper_left - lower_left) / 2
    down = (lower_left + lower_right - upper_left - upper_right) / 2
    perimeter_B = (across.square() + down.square() + FLAT).sqrt().sum((1, 2))
    return 4 * torch.pi * region_BHW.square().sum((1, 2)) / perimeter_B.square()


def lab(rgb_B3HW: Tensor) -> Tensor:
    """CIE L*a*b* (D65) of sRGB in 0..1: L in 0..100; B3HW."""
    import torch

    linear_B3HW = torch.where(rgb_B3HW > 0.04045, ((rgb_B3HW + 0.055) / 1.055) ** 2.4, rgb_B3HW / 12.92)
    to_xyz = torch.tensor(XYZ_OF_RGB, dtype=rgb_B3HW.dtype, device=rgb_B3HW.device)
    white_311 = torch.tensor(WHITE_XYZ, dtype=rgb_B3HW.dtype, device=rgb_B3HW.device)[:, None, None]
    xyz_B3HW = torch.einsum("ij,bjhw->bihw", to_xyz, linear_B3HW) / white_311
    root_B3HW = torch.where(xyz_B3HW > 0.008856, xyz_B3HW.clamp(min=1e-9) ** (1 / 3), 7.787 * xyz_B3HW + 16 / 116)
    x, y, z = root_B3HW.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)
