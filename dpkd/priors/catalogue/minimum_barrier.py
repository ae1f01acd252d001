"""The minimum barrier distance to the frame of an image, by raster scans; the one module here that loads numba."""

import numpy as np
import numpy.typing as npt
from numba import njit


def barrier_distance(image_HWC: npt.NDArray[np.uint8], passes: int) -> npt.NDArray[np.int32]:
    """Minimum barrier distance of each pixel to the frame, summed over the channels; int32 HW.

    The barrier of a path is its highest less its lowest value. Raster scanning (Zhang et al. 2015, algorithm 1) never
    gives less than the exact distance, and comes close to it in three passes.
    """
    distance_HW = np.zeros(image_HWC.shape[:2], np.int32)
    for channel in range(image_HWC.shape[2]):
        _add_channel(np.ascontiguousarray(image_HWC[:, :, channel]), passes, distance_HW)
    return distance_HW


@njit(cache=True)
def _add_channel(value_HW, passes, total_HW):  # type: ignore[no-untyped-def]
    """Adds one channel's distance to `total_HW`."""
    height, width = value_HW.shape
    highest_HW = value_HW.astype(np.int32)
    lowest_HW = value_HW.astype(np.int32)
    distance_HW = np.full((height, width), 1 << 20, np.int32)
    distance_HW[0], distance_HW[-1] = 0, 0
    distance_HW[:, 0], distance_HW[:, -1] = 0, 0
    for scan in range(passes):
        step = 1 if scan % 2 == 0 else -1  # down and right, then up and left, and so on
        first_row, first_column = (1, 1) if step == 1 else (height - 2, width - 2)
        for i in range(height - 2):
            y = first_row + i * step
            for j in range(width - 2):
                x = first_column + j * step
                value = np.int32(value_HW[y, x])
                for from_y, from_x in ((y - step, x), (y, x - step)):
                    highest = max(highest_HW[from_y, from_x], value)
                    lowest = min(lowest_HW[from_y, from_x], value)
                    if highest - lowest < distance_HW[y, x]:
                        distance_HW[y, x] = highest - lowest
                        highest_HW[y, x], lowest_HW[y, x] = highest, lowest
    total_HW += distance_HW
