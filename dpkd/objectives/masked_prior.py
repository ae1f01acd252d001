"""Masked prior prediction: prior maps from the features of a partly hidden view (MaskFeat, Wei et al. 2022).

Axes: B sample, C channel, H W height and width, N patches.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dpkd.models.resample import area_resample
from dpkd.objectives.draws import mix, random_keys

SPREAD_FLOOR = 0.05
"""Added to a map's standard deviation, so that a flat map is not blown up to noise."""


def random_patch_mask(index_B: Tensor, *, step: int, grid: tuple[int, int], ratio: float, seed: int) -> Tensor:
    """Hides `round(ratio * H * W)` patches of each sample; bool B1HW, true where hidden.

    A function of seed, step and sample index alone: the same on any rank, device and cut of the batch.
    """
    num_patches = grid[0] * grid[1]
    position_N = torch.arange(num_patches, device=index_B.device)
    key_B = random_keys(index_B, step=step, seed=seed)
    rank_BN = mix(key_B[:, None] + position_N).argsort(dim=1, stable=True).argsort(dim=1)
    return (rank_BN < round(ratio * num_patches)).view(-1, 1, *grid)


def hide_patches(image_BCHW: Tensor, mask_B1HW: Tensor) -> Tensor:
    """The normalised images with hidden patches set to zero, the mean colour."""
    height, width = image_BCHW.shape[2:]
    hidden_B1HW = F.interpolate(mask_B1HW.to(image_BCHW.dtype), size=(height, width), mode="nearest-exact")
    return image_BCHW * (1 - hidden_B1HW)


def prior_target(map_BCHW: Tensor, grid: tuple[int, int]) -> Tensor:
    """The map averaged over each patch, then standardised for each sample and channel over the grid; float32."""
    target_BCHW = area_resample(map_BCHW, grid)
    spread_BC11 = target_BCHW.std((2, 3), keepdim=True, correction=0)
    return (target_BCHW - target_BCHW.mean((2, 3), keepdim=True)) / (spread_BC11 + SPREAD_FLOOR)


def masked_prior(prediction_BCHW: Tensor, target_BCHW: Tensor, mask_B1HW: Tensor | None = None) -> Tensor:
    """Mean squared error over the hidden patches, over all patches without a mask; a scalar.

    A target that is not known (NaN) counts as met, so that a batch means the same however it is cut.
    """
    prediction_BCHW = prediction_BCHW.float()
    met_BCHW = torch.where(target_BCHW.isnan(), prediction_BCHW.detach(), target_BCHW)
    error_B1HW = (prediction_BCHW - met_BCHW).square().mean(1, keepdim=True)
    if mask_B1HW is None:
        return error_B1HW.mean()
    hidden_B1HW = mask_B1HW.to(error_B1HW.dtype)
    return (error_B1HW * hidden_B1HW).sum() / hidden_B1HW.sum().clamp(min=1)
