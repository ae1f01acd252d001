"""Co-occurrence matrices of grey levels, cell by cell; loads numba."""

import numpy as np
import numpy.typing as npt
from numba import njit


def cooccurrence_HWKK(  # noqa: N802 (the axes of what it gives)
    level_HW: npt.NDArray[np.uint8], *, levels: int, size: tuple[int, int]
) -> npt.NDArray[np.float32]:
    """Shares of pairs of levels among neighbours in each of height x width cells: symmetric, adding up to 1.

    Neighbours are those at 0, 45, 90 and 135 degrees that lie in the same cell; a cell of a single pixel counts it as
    its own neighbour. Where the grid does not divide the image, cells are whole pixels, at the nearest borders.
    """
    height, width = size
    rows, columns = _borders(level_HW.shape[0], height), _borders(level_HW.shape[1], width)
    count_HWKK = np.zeros((height, width, levels, levels), np.float32)
    _count(level_HW, rows, columns, count_HWKK)
    count_HWKK += count_HWKK.transpose(0, 1, 3, 2).copy()
    return count_HWKK / count_HWKK.sum((2, 3), keepdims=True)


def _borders(num_pixels: int, num_cells: int) -> npt.NDArray[np.int64]:
    return np.rint(np.arange(num_cells + 1) * num_pixels / num_cells).astype(np.int64)


@njit(cache=True)
def _count(level_HW, rows, columns, count_HWKK):  # type: ignore[no-untyped-def]
    for i in range(len(rows) - 1):
        for j in range(len(columns) - 1):
            top, bottom, left, right = rows[i], rows[i + 1], columns[j], columns[j + 1]
            count_KK = count_HWKK[i, j]
            if bottom - top == 1 and right - left == 1:
                count_KK[level_HW[top, left], level_HW[top, left]] = 1
            for y in range(top, bottom):
                for x in range(left, right):
                    here = level_HW[y, x]
                    if x + 1 < right:
                        count_KK[here, level_HW[y, x + 1]] += 1
                    if y + 1 < bottom:
                        count_KK[here, level_HW[y + 1, x]] += 1
                        if x + 1 < right:
                            count_KK[here, level_HW[y + 1, x + 1]] += 1
                        if x > left:
                            count_KK[here, level_HW[y + 1, x - 1]] += 1
