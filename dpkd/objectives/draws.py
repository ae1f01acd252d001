"""Random draws for samples of a batch, as functions of seed, step and sample index: the same on any rank and device.

Axes: B sample.
"""

from torch import Tensor


def random_keys(index_B: Tensor, *, step: int, seed: int) -> Tensor:
    """An int64 of even bits for each sample, B."""
    return mix(mix(index_B.long() + _signed(seed * 0x9E3779B97F4A7C15)) + step)


def random_share(index_B: Tensor, *, step: int, share: float, seed: int) -> Tensor:
    """Chooses each sample with probability `share`; bool B."""
    uniform_B = (_shift_right(mix(random_keys(index_B, step=step, seed=seed) + 1), 11)).double() / 2**53
    return uniform_B < share


def mix(value: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele et al. 2014) on int64, whose arithmetic wraps around."""
    value = value + _signed(0x9E3779B97F4A7C15)
    value = (value ^ _shift_right(value, 30)) * _signed(0xBF58476D1CE4E5B9)
    value = (value ^ _shift_right(value, 27)) * _signed(0x94D049BB133111EB)
    return value ^ _shift_right(value, 31)


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Logical shift: torch shifts the sign in."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The number that has these low 64 bits in two's complement."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value
