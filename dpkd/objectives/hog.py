"""Histograms of oriented gradients of the network's input view, on the training device.

The definition equals the prior `Hog`. A map of the view needs no storage, and a crop keeps full detail (as the target
of MaskFeat, Wei et al. 2022). Axes: B sample, C colour, H W height and width, K bins.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dpkd.models.resample import area_resample

BINS = 9
CELL = 8
"""Side of a cell in pixels."""
_CACHED_PIXELS, _MOST_PIXELS = 2**16, 2**23
"""Pixels that are processed together: on a CPU, whose cache holds their planes, and on a GPU."""


@torch.no_grad()
def hog(image_BCHW: Tensor, *, bins: int = BINS, cell: int = CELL) -> Tensor:
    """The maps of uint8 RGB images: float32 BKHW, one cell for about `cell` pixels a side, l2 norm 1 in each cell.

    Channel k is centred at (k + 0.5) · 180 / bins degrees.
    """
    height, width = image_BCHW.shape[2:]
    grid = (max(1, round(height / cell)), max(1, round(width / cell)))
    pixels = _CACHED_PIXELS if image_BCHW.device.type == "cpu" else _MOST_PIXELS
    parts = image_BCHW.split(max(1, pixels // (height * width)))
    histogram_BKHW = torch.cat([area_resample(_votes(part_BCHW, bins), grid) for part_BCHW in parts])
    return histogram_BKHW / (histogram_BKHW.square().sum(1, keepdim=True) + 1e-10).sqrt()


def _votes(image_BCHW: Tensor, bins: int) -> Tensor:
    """Each pixel's gradient magnitude, shared between the two bins nearest to its orientation; BKHW."""
    padded_BCHW = F.pad(image_BCHW.float(), (1, 1, 1, 1), mode="reflect")  # no gradient at the border
    dx_BCHW = padded_BCHW[:, :, 1:-1, 2:] - padded_BCHW[:, :, 1:-1, :-2]
    dy_BCHW = padded_BCHW[:, :, 2:, 1:-1] - padded_BCHW[:, :, :-2, 1:-1]
    # the colour with the largest gradient
    square_B1HW, largest_B1HW = dx_BCHW.square().addcmul_(dy_BCHW, dy_BCHW).max(1, keepdim=True)
    dx_B1HW, dy_B1HW = dx_BCHW.gather(1, largest_B1HW), dy_BCHW.gather(1, largest_B1HW)
    magnitude_B1HW = square_B1HW.sqrt()
    position_B1HW = torch.atan2(dy_B1HW, dx_B1HW) * (bins / torch.pi) + (bins - 0.5)
    below_B1HW = position_B1HW.floor()
    upper_B1HW = magnitude_B1HW * (position_B1HW - below_B1HW)
    below_B1HW = below_B1HW.long()
    votes_BKHW = dx_BCHW.new_zeros((len(image_BCHW), bins, *image_BCHW.shape[2:]))
    # assigned, not added: the two bins of a pixel differ, so the order of threads changes nothing
    votes_BKHW.scatter_(1, below_B1HW % bins, magnitude_B1HW - upper_B1HW)
    return votes_BKHW.scatter_(1, (below_B1HW + 1) % bins, upper_B1HW)
