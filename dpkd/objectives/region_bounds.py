"""What an expert says of a region, as bounds on its statistics.

Constrained CNNs (Pathak et al. 2015) with the quadratic penalty of Kervadec et al. 2019 (size constraints), which is
differentiable and needs no label. The region is the sigmoid of a logit, so a probability with a gradient everywhere; a
clamp would have none beyond 0 and 1, where bounds have to pull. Axes: B sample, H W rows and columns of the grid.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dpkd.models.resample import area_resample
from dpkd.objectives.settings import COLOUR_STATISTICS, STATISTICS

SMALLEST = 1e-6
"""Total weight of an empty region, in cells: where there is none, positions and colours mean nothing."""
FLAT = 1e-12
"""Added to squared gradients, so that the root can be differentiated where a region is even."""

XYZ_OF_RGB = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
"""Linear sRGB to CIE XYZ, D65."""
WHITE_XYZ = (0.950456, 1.0, 1.088754)


def fit_region(logit_B1HW: Tensor, map_B1HW: Tensor) -> Tensor:
    """Binary cross-entropy between the region and a prior map of any size, its mean over samples and cells; a scalar.

    A map that is not known (NaN) counts nothing, so that a batch means the same however it is cut.
    """
    map_B1HW = area_resample(map_B1HW, (logit_B1HW.shape[2], logit_B1HW.shape[3]))
    known_B1HW = ~map_B1HW.isnan()
    target_B1HW = torch.where(known_B1HW, map_B1HW.clamp(0, 1), 0.5)
    loss_B1HW = F.binary_cross_entropy_with_logits(logit_B1HW.float(), target_B1HW, reduction="none")
    return (loss_B1HW * known_B1HW).mean()


def bound_penalty(
    value_B: Tensor,
    *,
    statistic: str,
    at_least: float | None = None,
    at_most: float | None = None,
    bound_B: Tensor | None = None,
) -> Tensor:
    """`max(0, at_least - V)² + max(0, V - at_most)²`, V in shares of the statistic's range; its mean over samples.

    With `bound_B` (bool) only those samples are bound; the others count as met. A scalar.
    """
    low, high = STATISTICS[statistic]
    penalty_B = torch.zeros_like(value_B)
    if at_least is not None:
        penalty_B = penalty_B + ((at_least - value_B) / (high - low)).clamp(min=0).square()
    if at_most is not None:
        penalty_B = penalty_B + ((value_B - at_most) / (high - low)).clamp(min=0).square()
    return (penalty_B if bound_B is None else penalty_B * bound_B).mean()


def region_statistic(name: str, region_B1HW: Tensor, image_BCHW: Tensor) -> Tensor:
    """A statistic of soft regions in [0, 1]; B, in the units of `STATISTICS`.

    `area` is the share of the view; `row` and `column` the place of the centre (0 top and left, 1 bottom and right);
    `compactness` see there; `red`, `green`, `blue` in 0..1 and `lightness`, `a`, `b` of CIE L*a*b* (D65) the mean
    colours over the region of the uint8 RGB images, averaged to the grid.
    """
    region_BHW = region_B1HW.squeeze(1)
    if name == "area":
        return region_BHW.mean((1, 2))
    if name == "compactness":
        return compactness(region_BHW)
    height, width = region_BHW.shape[1:]
    if name in ("row", "column"):
        size, dim = (height, 2) if name == "row" else (width, 1)
        place = (torch.arange(size, device=region_BHW.device) + 0.5) / size
        weight_B = region_BHW.sum((1, 2)).clamp(min=SMALLEST)
        return (region_BHW.sum(dim) * place).sum(1) / weight_B
    assert name in COLOUR_STATISTICS, f"no such statistic {name!r}"
    colour_BHW = _colour(name, area_resample(image_BCHW, (height, width)) / 255)
    return (region_BHW * colour_BHW).sum((1, 2)) / region_BHW.sum((1, 2)).clamp(min=SMALLEST)


def compactness(region_BHW: Tensor) -> Tensor:
    """`4π Σp² / (Σ|∇p|)²` of soft regions p: 4πA/P² where p is 0 or 1, near 1 for a disc, small for thin or many; B.

    A soft region may be faint: with Σp² for the area no factor on p changes the value, and by the isoperimetric
    inequality for functions (Federer & Fleming 1960) none exceeds 1. What lies beyond the frame is not region.
    Gradients are taken between four neighbours: exact for edges along axes and diagonals, but each corner is cut by
    half a cell, so that few cells look rounder than they are: 3 x 3 cells have 0.96, 2 x 2 1.08, a single one 1.57.
    """
    padded_BHW = F.pad(region_BHW, (1, 1, 1, 1))
    upper_left, upper_right = padded_BHW[:, :-1, :-1], padded_BHW[:, :-1, 1:]
    lower_left, lower_right = padded_BHW[:, 1:, :-1], padded_BHW[:, 1:, 1:]
    across = (upper_right + lower_right - upper_left - lower_left) / 2
    down = (lower_left + lower_right - upper_left - upper_right) / 2
    perimeter_B = (across.square() + down.square() + FLAT).sqrt().sum((1, 2))
    return 4 * torch.pi * region_BHW.square().sum((1, 2)) / perimeter_B.square()


def _colour(name: str, rgb_B3HW: Tensor) -> Tensor:
    """One channel of images in 0..1, BHW."""
    if name in ("red", "green", "blue"):
        return rgb_B3HW[:, ("red", "green", "blue").index(name)]
    return lab(rgb_B3HW)[:, ("lightness", "a", "b").index(name)]


def lab(rgb_B3HW: Tensor) -> Tensor:
    """CIE L*a*b* (D65) of sRGB in 0..1: L in 0..100; B3HW."""
    linear_B3HW = torch.where(rgb_B3HW > 0.04045, ((rgb_B3HW + 0.055) / 1.055) ** 2.4, rgb_B3HW / 12.92)
    to_xyz = torch.tensor(XYZ_OF_RGB, dtype=rgb_B3HW.dtype, device=rgb_B3HW.device)
    white_311 = torch.tensor(WHITE_XYZ, dtype=rgb_B3HW.dtype, device=rgb_B3HW.device)[:, None, None]
    xyz_B3HW = torch.einsum("ij,bjhw->bihw", to_xyz, linear_B3HW) / white_311
    root_B3HW = torch.where(xyz_B3HW > 0.008856, xyz_B3HW.clamp(min=1e-9) ** (1 / 3), 7.787 * xyz_B3HW + 16 / 116)
    x, y, z = root_B3HW.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)
