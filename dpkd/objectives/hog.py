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


@torch.no_grad()
def hog(image_BCHW: Tensor, *, bins: int = BINS, cell: int = CELL) -> Tensor:
    """The maps of uint8 RGB images: float32 BKHW, one cell for about `cell` pixels a side, l2 norm 1 in each cell.

    Channel k is centred at (k + 0.5) · 180 / bins degrees. Bins are computed one at a time, so memory holds only a few
    planes of the images.
    """
    padded_BCHW = F.pad(image_BCHW.float(), (1, 1, 1, 1), mode="reflect")  # no gradient at the border
    dx_BCHW = padded_BCHW[:, :, 1:-1, 2:] - padded_BCHW[:, :, 1:-1, :-2]
    dy_BCHW = padded_BCHW[:, :, 2:, 1:-1] - padded_BCHW[:, :, :-2, 1:-1]
    largest_B1HW = (dx_BCHW.square() + dy_BCHW.square()).argmax(1, keepdim=True)  # the colour with the largest gradient
    dx_B1HW, dy_B1HW = dx_BCHW.gather(1, largest_B1HW), dy_BCHW.gather(1, largest_B1HW)
    magnitude_B1HW = torch.hypot(dx_B1HW, dy_B1HW)
    position_B1HW = torch.atan2(dy_B1HW, dx_B1HW) * (bins / torch.pi) - 0.5
    height, width = image_BCHW.shape[2:]
    grid = (max(1, round(height / cell)), max(1, round(width / cell)))
    planes = []
    for k in range(bins):
        distance_B1HW = (position_B1HW - k) % bins
        share_B1HW = (1 - torch.minimum(distance_B1HW, bins - distance_B1HW)).clamp(min=0)
        planes.append(area_resample(magnitude_B1HW * share_B1HW, grid))
    histogram_BKHW = torch.cat(planes, dim=1)
    return histogram_BKHW / (histogram_BKHW.square().sum(1, keepdim=True) + 1e-10).sqrt()
