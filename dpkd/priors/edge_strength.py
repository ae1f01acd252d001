"""The colour gradient, pixel by pixel; loads numba."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from numba import njit

Image = npt.NDArray[np.float32]


def add_edge_strength(smooth: Sequence[Image], *, weights: Sequence[float], scale: float, total_HW: Image) -> None:
    """Adds `scale` times the square root of the structure tensor's larger eigenvalue to `total_HW`.

    The tensor is Σ_c w_c² ∇I_c ∇I_cᵀ over the planes I_c of a smoothed image, HW float32, by central differences,
    which are 0 across the frame.
    """
    squares_C = np.square(np.asarray(weights, np.float32))
    _add(tuple(smooth), squares_C, np.float32(scale), total_HW)


@njit(cache=True, error_model="numpy")
def _add(planes, squares_C, scale, total_HW):  # type: ignore[no-untyped-def]
    height, width = total_HW.shape
    xx_W, yy_W, xy_W = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
    for y in range(height):
        inside = 0 < y < height - 1
        xx_W[:] = 0
        yy_W[:] = 0
        xy_W[:] = 0
        for c in range(len(planes)):
            level = planes[c][y]
            above = planes[c][y - 1] if inside else level
            below = planes[c][y + 1] if inside else level
            square = squares_C[c] * np.float32(0.25)
            for x in range(1, width - 1):
                dx, dy = level[x + 1] - level[x - 1], below[x] - above[x]
                xx_W[x] += square * dx * dx
                yy_W[x] += square * dy * dy
                xy_W[x] += square * dx * dy
            for x in range(0, width, max(1, width - 1)):  # both ends
                dy = below[x] - above[x]
                yy_W[x] += square * dy * dy
        for x in range(width):
            difference, twice = xx_W[x] - yy_W[x], xy_W[x] + xy_W[x]
            root = np.sqrt(difference * difference + twice * twice)
            total_HW[y, x] += scale * np.sqrt((xx_W[x] + yy_W[x] + root) * np.float32(0.5))
