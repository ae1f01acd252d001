"""Random draws for samples of a batch; functions of seed, step and sample index, equal on all ranks and devices.

Axes: B sample, C channel, H W height and width, N patches.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

TURNS, MIXES, LAYERS, STRONG = (number << 32 for number in (1, 2, 3, 4))
"""Streams of draws: those of two streams are independent. Patches and shares use the numbers below them."""


def uniform(index_B: Tensor, *, step: int, seed: int, stream: int = 1) -> Tensor:
    """A uniform number from [0, 1) for each sample; float64 B."""
    return _shift_right(_mix(_random_keys(index_B, step=step, seed=seed) + stream), 11).double() / 2**53


def beta(index_B: Tensor, alpha: int, *, step: int, seed: int, stream: int) -> Tensor:
    """A number from Beta(alpha, alpha) for each sample: the middle one of `2 alpha - 1` uniform numbers; float64 B."""
    draws = [uniform(index_B, step=step, seed=seed, stream=stream + turn) for turn in range(2 * alpha - 1)]
    return torch.stack(draws).median(0).values


def random_share(index_B: Tensor, *, step: int, share: float, seed: int) -> Tensor:
    """Chooses each sample with probability `share`; bool B."""
    return uniform(index_B, step=step, seed=seed) < share


def random_patch_mask(index_B: Tensor, *, step: int, grid: tuple[int, int], ratio: float, seed: int) -> Tensor:
    """Chooses `round(ratio * H * W)` hidden patches of each sample; bool B1HW, true for hidden patches."""
    num_patches = grid[0] * grid[1]
    position_N = torch.arange(num_patches, device=index_B.device)
    key_B = _random_keys(index_B, step=step, seed=seed)
    rank_BN = _mix(key_B[:, None] + position_N).argsort(dim=1, stable=True).argsort(dim=1)
    return (rank_BN < round(ratio * num_patches)).view(-1, 1, *grid)


def hide_patches(image_BCHW: Tensor, mask_B1HW: Tensor) -> Tensor:
    """The normalised images with zero, the mean colour, in hidden patches."""
    height, width = image_BCHW.shape[2:]
    hidden_B1HW = F.interpolate(mask_B1HW.to(image_BCHW.dtype), size=(height, width), mode="nearest-exact")
    return image_BCHW * (1 - hidden_B1HW)


def _random_keys(index_B: Tensor, *, step: int, seed: int) -> Tensor:
    """An int64 of uniform random bits for each sample, B."""
    return _mix(_mix(index_B.long() + _signed(seed * 0x9E3779B97F4A7C15)) + step)


def _mix(value: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele et al. 2014) on int64, whose arithmetic wraps around."""
    value = value + _signed(0x9E3779B97F4A7C15)
    value = (value ^ _shift_right(value, 30)) * _signed(0xBF58476D1CE4E5B9)
    value = (value ^ _shift_right(value, 27)) * _signed(0x94D049BB133111EB)
    return value ^ _shift_right(value, 31)


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Logical right shift; `>>` in torch copies the sign bit."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 with these low 64 bits in two's complement."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value
