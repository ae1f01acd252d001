"""Votes of gradients for the centres of round things; loads numba."""

import numpy as np
import numpy.typing as npt
from numba import njit

WEAKEST = 4.0
"""Gradient, in grey levels a pixel, below which a pixel does not vote."""


def radial_votes(
    dx_HW: npt.NDArray[np.int16], dy_HW: npt.NDArray[np.int16], radius: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Orientation and magnitude projection at one radius, float32 HW, of a Sobel gradient (8 times the slope)."""
    votes_HW, amounts_HW = np.zeros(dx_HW.shape, np.float32), np.zeros(dx_HW.shape, np.float32)
    _vote(dx_HW, dy_HW, radius, votes_HW, amounts_HW)
    return votes_HW, amounts_HW


@njit(cache=True, error_model="numpy")
def _vote(dx_HW, dy_HW, radius, votes_HW, amounts_HW):  # type: ignore[no-untyped-def]
    height, width = dx_HW.shape
    for y in range(height):
        for x in range(width):
            dx, dy = np.float32(dx_HW[y, x]) / 8, np.float32(dy_HW[y, x]) / 8
            length = np.sqrt(dx * dx + dy * dy)
            if length < WEAKEST:
                continue
            step_x, step_y = int(np.rint(dx / length * radius)), int(np.rint(dy / length * radius))
            for sign in (1, -1):
                at_x, at_y = x + sign * step_x, y + sign * step_y
                if 0 <= at_x < width and 0 <= at_y < height:
                    votes_HW[at_y, at_x] += sign
                    amounts_HW[at_y, at_x] += sign * length
