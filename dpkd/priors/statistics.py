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

    @staticmethod
    def of(map_HWC: Map) -> "Moments":
        """The moments of one map; cells that are not known (NaN) do not count."""
        cell_NC = map_HWC.reshape(-1, map_HWC.shape[2])
        cell_NC = cell_NC[~np.isnan(cell_NC[:, 0])]
        return Moments(
            len(cell_NC), tuple(cell_NC.sum(0).tolist()), tuple(np.einsum("nc,nc->c", cell_NC, cell_NC).tolist())
        )

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
