"""Eigenvalues of the Hessian, pixel by pixel; loads numba."""

import numpy as np
import numpy.typing as npt
from numba import njit


def add_ridges(smooth_HW: npt.NDArray[np.float32], scale: float, strength_HWC: npt.NDArray[np.float32]) -> None:
    """Raises bright and dark ridge strength (two channels) to that of an image smoothed at `scale`; the frame stays."""
    _add_ridges(smooth_HW, np.float32(scale * scale), strength_HWC)


@njit(cache=True, error_model="numpy")
def _add_ridges(smooth_HW, scale_square, strength_HWC):  # type: ignore[no-untyped-def]
    height, width = smooth_HW.shape
    low_W, high_W = np.empty(width, np.float32), np.empty(width, np.float32)
    for y in range(1, height - 1):
        above, level, below = smooth_HW[y - 1], smooth_HW[y], smooth_HW[y + 1]
        for x in range(1, width - 1):
            twice = level[x] + level[x]
            xx = level[x - 1] + level[x + 1] - twice
            yy = above[x] + below[x] - twice
            xy = (above[x - 1] + below[x + 1] - above[x + 1] - below[x - 1]) * np.float32(0.25)
            middle = (xx + yy) * np.float32(0.5)
            slant = (xx - yy) * np.float32(0.5)
            spread = np.sqrt(slant * slant + xy * xy)
            low_W[x] = (spread - middle) * scale_square
            high_W[x] = (spread + middle) * scale_square
        for x in range(1, width - 1):
            strength_HWC[y, x, 0] = max(strength_HWC[y, x, 0], low_W[x])
            strength_HWC[y, x, 1] = max(strength_HWC[y, x, 1], high_W[x])
