"""Histograms over the cells of a grid, a pixel on a border shared by area; loads numba."""

import numpy as np
import numpy.typing as npt
from numba import njit


def cell_histogram(
    bin_HW: npt.NDArray[np.uint8],
    *,
    num_bins: int,
    size: tuple[int, int],
    weight_HW: npt.NDArray[np.uint8] | None = None,
) -> npt.NDArray[np.float32]:
    """The sum of the weights (1 without) of the pixels of each bin in each of height x width cells, HWC over bins.

    Each cell's sums are divided by its area in pixels, so that without weights they add up to 1.
    """
    height, width = size
    area = bin_HW.shape[0] / height * (bin_HW.shape[1] / width)
    histogram_HWC = np.zeros((height, width, num_bins), np.float32)
    weight = np.ones((1, 1), np.uint8) if weight_HW is None else weight_HW
    _add(bin_HW, weight, _shares(bin_HW.shape[0], height), _shares(bin_HW.shape[1], width), histogram_HWC)
    histogram_HWC *= np.float32(1 / area)
    return histogram_HWC


def _shares(num_pixels: int, num_cells: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """For each pixel of an axis the cell it begins in, and the share of it in that cell; the rest is in the next."""
    first = np.arange(num_pixels) * num_cells // num_pixels
    end = np.minimum((first + 1) * num_pixels, (np.arange(num_pixels) + 1) * num_cells)
    share = (end - np.arange(num_pixels) * num_cells) / num_cells
    return first.astype(np.int32), share.astype(np.float32)


@njit(cache=True)
def _add(bin_HW, weight_HW, rows, columns, histogram_HWC):  # type: ignore[no-untyped-def]
    """Adds each pixel to the one, two or four cells that it lies in."""
    height, width = bin_HW.shape
    (row_H, row_share_H), (column_W, column_share_W) = rows, columns
    weighted = weight_HW.size > 1
    for y in range(height):
        row, row_share = row_H[y], row_share_H[y]
        for x in range(width):
            column, column_share, k = column_W[x], column_share_W[x], bin_HW[y, x]
            weight = np.float32(weight_HW[y, x]) if weighted else np.float32(1)
            upper = weight * row_share
            histogram_HWC[row, column, k] += upper * column_share
            if column_share < 1:
                histogram_HWC[row, column + 1, k] += upper * (1 - column_share)
            if row_share < 1:
                lower = weight - upper
                histogram_HWC[row + 1, column, k] += lower * column_share
                if column_share < 1:
                    histogram_HWC[row + 1, column + 1, k] += lower * (1 - column_share)
