"""Functions for several extractors: numba kernels, and means and histograms over the cells of a grid."""

from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.float32]

OPENCV_CHANNELS = 4
"""Maximum number of channels for OpenCV's area resampling."""


class Kernel:
    """A function over pixels, compiled by numba at the first call: settings import this module, and numba is slow.

    A kernel may call another kernel: numba reads `_numba_type_` of unknown globals.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.__doc__ = function.__doc__

    @cached_property
    def _compiled(self) -> Any:
        from numba import njit  # noqa: PLC0415

        return njit(cache=True, error_model="numpy")(self._function)

    @property
    def _numba_type_(self) -> Any:
        return self._compiled._numba_type_

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._compiled(*arguments, **keywords)


def cell_means(image_HWC: Image, size: tuple[int, int]) -> Image:
    """The mean of each of height x width cells, by area; float32 HWC, even if the image has no channel axis.

    If the grid is finer than the image, values are interpolated.
    """
    height, width = size
    planes = image_HWC.reshape(*image_HWC.shape[:2], -1)
    means = [
        cv2.resize(planes[:, :, start : start + OPENCV_CHANNELS], (width, height), interpolation=cv2.INTER_AREA)
        for start in range(0, planes.shape[2], OPENCV_CHANNELS)
    ]
    return np.concatenate([np.asarray(mean, np.float32).reshape(height, width, -1) for mean in means], axis=2)


def cell_histogram(
    bin_HW: npt.NDArray[np.uint8], weight_HW: npt.NDArray[np.uint8], *, num_bins: int, size: tuple[int, int]
) -> Image:
    """The sum of the pixel weights of each bin in each of height x width cells, HWC over bins.

    Cells share a pixel on a border by area. The sums are divided by the area of the cell in pixels, so weights of 1 sum
    to 1.
    """
    height, width = size
    area = bin_HW.shape[0] / height * (bin_HW.shape[1] / width)
    histogram_HWC = np.zeros((height, width, num_bins), np.float32)
    _add_pixels(bin_HW, weight_HW, _shares(bin_HW.shape[0], height), _shares(bin_HW.shape[1], width), histogram_HWC)
    histogram_HWC *= np.float32(1 / area)
    return histogram_HWC


@lru_cache(maxsize=16)
def _shares(num_pixels: int, num_cells: int) -> tuple[npt.NDArray[np.int32], Image]:
    """For each pixel of an axis, its first cell and its share in that cell; the rest is in the next cell."""
    first = np.arange(num_pixels) * num_cells // num_pixels
    end = np.minimum((first + 1) * num_pixels, (np.arange(num_pixels) + 1) * num_cells)
    share = (end - np.arange(num_pixels) * num_cells) / num_cells
    return first.astype(np.int32), share.astype(np.float32)


@Kernel
def _add_pixels(bin_HW, weight_HW, rows, columns, histogram_HWC):  # type: ignore[no-untyped-def]
    """Adds each pixel to its one, two or four cells."""
    height, width = bin_HW.shape
    (row_H, row_share_H), (column_W, column_share_W) = rows, columns
    for y in range(height):
        row, row_share = row_H[y], row_share_H[y]
        for x in range(width):
            column, column_share, k = column_W[x], column_share_W[x], bin_HW[y, x]
            weight = np.float32(weight_HW[y, x])
            upper = weight * row_share
            histogram_HWC[row, column, k] += upper * column_share
            if column_share < 1:
                histogram_HWC[row, column + 1, k] += upper * (1 - column_share)
            if row_share < 1:
                lower = weight - upper
                histogram_HWC[row + 1, column, k] += lower * column_share
                if column_share < 1:
                    histogram_HWC[row + 1, column + 1, k] += lower * (1 - column_share)
