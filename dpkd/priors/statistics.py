"""Mean and deviation of each channel of a map, over all cells of all samples, summed shard by shard."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dpkd.priors.codecs import Map


@dataclass(frozen=True)
class Moments:
    """Count, sum and sum of squares of each channel; moments of disjoint samples add up."""

    count: int
    sum_C: tuple[float, ...]
    square_sum_C: tuple[float, ...]

    @staticmethod
    def zero(channels: int) -> "Moments":
        """The moments of no sample."""
        return Moments(0, (0.0,) * channels, (0.0,) * channels)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(
            self.count + other.count,
            tuple(np.add(self.sum_C, other.sum_C).tolist()),
            tuple(np.add(self.square_sum_C, other.square_sum_C).tolist()),
        )

    @property
    def mean_C(self) -> npt.NDArray[np.float64]:  # noqa: N802 (the axis)
        """Mean of each channel; NaN without a cell."""
        return self._over_count(self.sum_C)

    @property
    def deviation_C(self) -> npt.NDArray[np.float64]:  # noqa: N802
        """Standard deviation of each channel; NaN without a cell."""
        return np.sqrt(np.maximum(self._over_count(self.square_sum_C) - self.mean_C**2, 0))

    def _over_count(self, sum_C: tuple[float, ...]) -> npt.NDArray[np.float64]:
        return np.asarray(sum_C) / self.count if self.count else np.full(len(sum_C), np.nan)


class Tally:
    """Adds up the moments of one map over samples."""

    def __init__(self, channels: int) -> None:
        self._count = 0
        self._sum_C, self._square_sum_C = np.zeros(channels), np.zeros(channels)

    def add(self, map_HWC: Map) -> None:
        """Counts the cells of one sample's map; a map that is not known (NaN) does not count."""
        if np.isnan(map_HWC[0, 0, 0]):
            return
        self._count += map_HWC.shape[0] * map_HWC.shape[1]
        self._sum_C += np.einsum("hwc->c", map_HWC)
        self._square_sum_C += np.einsum("hwc,hwc->c", map_HWC, map_HWC)

    @property
    def moments(self) -> Moments:
        """Those of all samples added so far."""
        return Moments(self._count, tuple(self._sum_C.tolist()), tuple(self._square_sum_C.tolist()))
