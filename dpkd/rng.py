"""Random draws as pure functions of a seed, a purpose and a place, the same in all future versions.

NumPy promises that the raw bits of a bit generator never change (NEP 19), but its distributions may change. So all
draws use raw bits. Philox (Salmon et al. 2011) turns a counter into bits; the place is the counter.
"""

from enum import IntEnum
from threading import Lock

import numpy as np
from numpy.typing import NDArray

_LOCK = Lock()
_PHILOX = np.random.Philox(key=0)
_STATE = _PHILOX.state
"""The state before the first number."""


class Purpose(IntEnum):
    """The purpose of draws; two purposes never share a stream. The numbers are part of the order contract."""

    SHARDS = 1
    SAMPLES = 2
    CLASSES = 3
    VIEWS = 4
    BACKGROUNDS = 5


def bits(count: int, *, seed: int, purpose: Purpose, place: tuple[int, int] = (0, 0)) -> NDArray[np.uint64]:
    """`count` random 64-bit numbers [count] of this seed, purpose and place."""
    key = np.array([seed % 2**64, purpose], np.uint64)
    counter = np.array([0, 0, *place], np.uint64)  # the generator increments the first two words
    with _LOCK:  # a generator of its own for each place would take five times as long
        _PHILOX.state = {**_STATE, "state": {"key": key, "counter": counter}}
        return _PHILOX.random_raw(count)


def uniform(count: int, *, seed: int, purpose: Purpose, place: tuple[int, int] = (0, 0)) -> NDArray[np.float64]:
    """`count` uniform numbers [count] from [0, 1), multiples of 2^-53."""
    raw = bits(count, seed=seed, purpose=purpose, place=place)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(count: int, *, seed: int, purpose: Purpose, place: tuple[int, int] = (0, 0)) -> NDArray[np.int64]:
    """A random order [count] of 0 … count - 1."""
    return np.argsort(bits(count, seed=seed, purpose=purpose, place=place), kind="stable")
