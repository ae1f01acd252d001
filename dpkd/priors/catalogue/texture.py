"""Texture: local binary patterns, Gabor energy, and the co-occurrence of grey levels."""

from functools import cache, lru_cache
from typing import ClassVar, Literal

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import Field

from dpkd.priors.base import ImageViews, PriorConfig, grid_size
from dpkd.priors.catalogue.kernels import Image, Kernel, cell_histogram, cell_means
from dpkd.priors.codecs import BYTES, NIBBLES, Codec, Map

CORNER, SIDE, CENTRE = 512, 212, 88
"""Local binary patterns: bilinear weights, in 1,024ths, of the pixels around a diagonal neighbour at radius 1. They are
integers with the sum 1,024: neighbours equal to the centre stay equal."""
DIRECTIONS = 4
"""Gabor: 0, 45, 90 and 135 degrees."""
WAVELENGTH_PX = 4.0
"""Gabor: wavelength of the finest octave; it doubles with each octave."""
SIGMA_PX = 0.56 * WAVELENGTH_PX
"""Gabor: deviation of the Gaussian envelope, for a bandwidth of one octave (Daugman 1985)."""
REACH_PX = 6
"""Gabor: pixels to each side under a filter; it is cut at about 2.7 deviations."""
FULL_SCALE = 48.0
"""Gabor: the amplitude, in grey levels, that is stored as 1."""
LEVELS = 8
"""Co-occurrence: levels of luma."""


class Lbp(PriorConfig):
    """Square roots of the shares of ten patterns in a cell every `stride` pixels: ten channels in [0, 1].

    Rotation-invariant uniform patterns of 8 neighbours at radius 1 (Ojala, Pietikäinen & Mäenpää 2002, LBP^riu2_8,1)
    of luma: channels 0 to 8 count neighbours not darker than the centre; channel 9 is any pattern with more than two
    changes around the circle. The map does not depend on changes of light that keep the order of the grey levels.
    """

    kind: Literal["lbp"] = "lbp"
    stride: int = Field(16, ge=2)

    channels: ClassVar[int] = 10
    codec: ClassVar[Codec] = NIBBLES

    def map(self, image: ImageViews) -> Map:
        pattern_HW, size = uniform_patterns(image.grey8_HW), grid_size(image, self.stride)
        return np.sqrt(cell_histogram(pattern_HW, np.ones_like(pattern_HW), num_bins=self.channels, size=size))


def uniform_patterns(grey_HW: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The rotation-invariant uniform pattern of each pixel, 0 to 9; border pixels are replicated."""
    code_HW = _codes(cv2.copyMakeBorder(grey_HW, 1, 1, 1, 1, cv2.BORDER_REPLICATE))
    return np.asarray(cv2.LUT(code_HW, _uniform()), np.uint8)


@cache
def _uniform() -> npt.NDArray[np.uint8]:
    """The pattern of each code of eight bits."""
    bit_KN = np.arange(256)[:, None] >> np.arange(8) & 1
    num_changes_K = (bit_KN != np.roll(bit_KN, 1, axis=1)).sum(1)
    return np.where(num_changes_K <= 2, bit_KN.sum(1), 9).astype(np.uint8)


@Kernel
def _codes(grey_HW):  # type: ignore[no-untyped-def]
    """For each pixel except the border, one bit for each neighbour that is not darker, starting at the right."""
    height, width = grey_HW.shape[0] - 2, grey_HW.shape[1] - 2
    code_HW = np.empty((height, width), np.uint8)
    for y in range(height):
        above, level, below, code_W = grey_HW[y], grey_HW[y + 1], grey_HW[y + 2], code_HW[y]
        for x in range(width):
            a, b, c = np.int32(above[x]), np.int32(above[x + 1]), np.int32(above[x + 2])
            d, e, f = np.int32(level[x]), np.int32(level[x + 1]), np.int32(level[x + 2])
            g, h, i = np.int32(below[x]), np.int32(below[x + 1]), np.int32(below[x + 2])
            centre = e * (1024 - CENTRE)
            code = np.int32(f >= e) | np.int32(b >= e) << 2 | np.int32(d >= e) << 4 | np.int32(h >= e) << 6
            code |= np.int32(c * CORNER + (b + f) * SIDE >= centre) << 1
            code |= np.int32(a * CORNER + (b + d) * SIDE >= centre) << 3
            code |= np.int32(g * CORNER + (d + h) * SIDE >= centre) << 5
            code |= np.int32(i * CORNER + (f + h) * SIDE >= centre) << 7
            code_W[x] = np.uint8(code)
    return code_HW


class Gabor(PriorConfig):
    """Square root of the filters' amplitude in a cell every `stride` pixels: 4 directions in each octave, in [0, 1].

    Quadrature pairs (Gabor energy, Adelson & Bergen 1985) of luma, of wavelengths 4, 8, 16 ... px on a pyramid, at
    every second pixel of each octave: amplitude √(even² + odd²), its mean over the cell divided by 48 grey levels,
    clipped, square-rooted. Channel 4·o + d is octave o from the finest, and d the direction of the wave: 0, 45, 90 or
    135 degrees from x towards y, y down.
    """

    kind: Literal["gabor"] = "gabor"
    octaves: int = Field(3, ge=1, le=5)
    stride: int = Field(16, ge=2)

    version: ClassVar[int] = 2
    codec: ClassVar[Codec] = NIBBLES

    @property
    def channels(self) -> int:
        return DIRECTIONS * self.octaves

    def map(self, image: ImageViews) -> Map:
        size = grid_size(image, self.stride)
        grey_HW, planes = image.grey_HW, []
        for octave in range(self.octaves):
            if octave:  # by area, which commutes with mirroring
                height, width = ((side + 1) // 2 for side in grey_HW.shape)
                grey_HW = np.asarray(cv2.resize(grey_HW, (width, height), interpolation=cv2.INTER_AREA), np.float32)
            planes += [cell_means(plane_HW, size) for plane_HW in _amplitudes(grey_HW)]
        return np.sqrt(np.minimum(np.concatenate(planes, axis=2) * np.float32(1 / FULL_SCALE), np.float32(1)))

    def flip(self, map_HWC: Map) -> Map:
        """The map of the mirrored image: mirrored, with 45 and 135 degrees exchanged."""
        order_C = [octave + d for octave in range(0, self.channels, DIRECTIONS) for d in (0, 3, 2, 1)]
        return np.ascontiguousarray(map_HWC[:, ::-1, order_C])


def _amplitudes(grey_HW: Image) -> Image:
    """√(even² + odd²) of the four directions, DHW, every 2 px: symmetric to the middle of the image.

    exp(i(ux + vy)) is the product of a filter along x and one along y, so each pair consists of separable filters.
    """
    height, width = grey_HW.shape
    padded_HW = cv2.copyMakeBorder(grey_HW, REACH_PX, REACH_PX + 1, REACH_PX, REACH_PX + 1, cv2.BORDER_REFLECT_101)
    size = ((height + 1) // 2, (width + 1) // 2)
    return np.asarray(_filtered(padded_HW, _filters(height % 2), _filters(width % 2), size), np.float32)


@Kernel
def _filtered(padded_HW, filter_y_FK, filter_x_FK, size):  # type: ignore[no-untyped-def]
    height, width = size
    num_filters, padded_width = len(filter_y_FK), padded_HW.shape[1]
    row_FW, column_2FW = (
        np.empty((num_filters, padded_width), np.float32),
        np.empty((2, num_filters, padded_width // 2), np.float32),
    )
    part_PW, amplitude_DHW = np.empty((8, width), np.float32), np.empty((DIRECTIONS, height, width), np.float32)
    for y in range(height):
        row_FW[:] = 0
        for f in range(num_filters):
            for k in range(filter_y_FK.shape[1]):
                weight = filter_y_FK[f, k]
                for x in range(padded_width):
                    row_FW[f, x] += weight * padded_HW[2 * y + k, x]
            for x in range(padded_width // 2):
                column_2FW[0, f, x], column_2FW[1, f, x] = row_FW[f, 2 * x], row_FW[f, 2 * x + 1]
        part_PW[:] = 0
        for p, fx, fy in ((0, 1, 0), (1, 2, 0), (2, 0, 1), (3, 0, 2), (4, 3, 3), (5, 4, 4), (6, 3, 4), (7, 4, 3)):
            for k in range(filter_x_FK.shape[1]):
                weight, parity, start = filter_x_FK[fx, k], k % 2, k // 2
                for x in range(width):
                    part_PW[p, x] += weight * column_2FW[parity, fy, np.uint64(x + start)]
        for x in range(width):
            cc, ss, cs, sc = part_PW[4, x], part_PW[5, x], part_PW[6, x], part_PW[7, x]
            amplitude_DHW[0, y, x] = np.sqrt(part_PW[0, x] ** 2 + part_PW[1, x] ** 2)
            amplitude_DHW[1, y, x] = np.sqrt((cc - ss) ** 2 + (cs + sc) ** 2)
            amplitude_DHW[2, y, x] = np.sqrt(part_PW[2, x] ** 2 + part_PW[3, x] ** 2)
            amplitude_DHW[3, y, x] = np.sqrt((cc + ss) ** 2 + (cs - sc) ** 2)
    return amplitude_DHW


@lru_cache(maxsize=2)
def _filters(odd: int) -> Image:
    """Five filters: a Gaussian, and its products with cos and sin of the whole frequency, then of the diagonal's share.

    They are around a pixel for an axis of odd length, else between two pixels. cos gives 0 for a uniform image. The
    scale gives amplitude 1 for a wave of amplitude 1 along the filter (on a diagonal, for the product of two filters).
    """
    x_K = np.arange(2 * REACH_PX + 2 - odd) - (2 * REACH_PX + 1 - odd) / 2
    gauss_K = np.exp(-0.5 * (x_K / SIGMA_PX) ** 2)
    gauss_K /= gauss_K.sum()
    filters = [gauss_K]
    for share, scale in ((1.0, 2.0), (np.sqrt(0.5), np.sqrt(2))):
        phase_K = 2 * np.pi * share * x_K / WAVELENGTH_PX
        even_K = np.cos(phase_K) - (gauss_K * np.cos(phase_K)).sum()
        filters += [scale * gauss_K * even_K, scale * gauss_K * np.sin(phase_K)]
    return np.stack(filters).astype(np.float32)


class Glcm(PriorConfig):
    """Contrast, homogeneity, energy, entropy and correlation in a cell every `stride` pixels: five channels in [0, 1].

    P is the cell's grey-level co-occurrence matrix (Haralick et al. 1973) with 8 levels of luma, symmetric, over
    neighbours at 0, 45, 90 and 135 degrees within the cell. With i, j in 0..7: contrast √(Σ P (i-j)² / 49),
    homogeneity Σ P / (1 + (i-j)²), energy √(Σ P²), entropy -Σ P log P / log 64, (1 + correlation) / 2; a uniform cell
    has correlation 1.
    """

    kind: Literal["glcm"] = "glcm"
    stride: int = Field(16, ge=2)

    channels: ClassVar[int] = 5
    codec: ClassVar[Codec] = BYTES

    def map(self, image: ImageViews) -> Map:
        level_HW = np.right_shift(image.grey8_HW, 5, dtype=np.uint8)
        size = grid_size(image, self.stride)
        rows, columns = (  # whole pixels: the nearest borders if the grid does not divide the image
            np.rint(np.arange(num_cells + 1) * num_pixels / num_cells).astype(np.int64)
            for num_pixels, num_cells in zip(level_HW.shape, size, strict=True)
        )
        count_HWKK = np.zeros((*size, LEVELS, LEVELS), np.float32)
        _add_neighbours(level_HW, rows, columns, count_HWKK)
        count_HWKK += count_HWKK.transpose(0, 1, 3, 2).copy()
        p_HWKK = count_HWKK / count_HWKK.sum((2, 3), keepdims=True)
        i_K = np.arange(LEVELS, dtype=np.float32)
        square_KK = (i_K[:, None] - i_K) ** 2
        contrast_HW = np.sqrt(np.tensordot(p_HWKK, square_KK / (LEVELS - 1) ** 2, 2))
        homogeneity_HW = np.tensordot(p_HWKK, 1 / (1 + square_KK), 2)
        energy_HW = np.sqrt(np.square(p_HWKK).sum((2, 3)))
        entropy_HW = -(p_HWKK * np.log(np.maximum(p_HWKK, 1e-12))).sum((2, 3)) / np.log(LEVELS**2)
        share_HWK = p_HWKK.sum(3)
        mean_HW = share_HWK @ i_K
        variance_HW = share_HWK @ i_K**2 - mean_HW**2
        covariance_HW = np.tensordot(p_HWKK, np.outer(i_K, i_K), 2) - mean_HW**2
        correlation_HW = np.where(variance_HW > 1e-5, covariance_HW / np.maximum(variance_HW, 1e-5), 1)
        channels = [contrast_HW, homogeneity_HW, energy_HW, entropy_HW, (1 + correlation_HW) / 2]
        return np.clip(np.stack(channels, axis=2), 0, 1).astype(np.float32)


@Kernel
def _add_neighbours(level_HW, rows, columns, count_HWKK):  # type: ignore[no-untyped-def]
    """Counts the level pairs of neighbours in each cell, in one direction; `rows` and `columns` are cell borders."""
    for i in range(len(rows) - 1):
        for j in range(len(columns) - 1):
            top, bottom, left, right = rows[i], rows[i + 1], columns[j], columns[j + 1]
            count_KK = count_HWKK[i, j]
            if bottom - top == 1 and right - left == 1:  # a single pixel counts as a neighbour of itself
                count_KK[level_HW[top, left], level_HW[top, left]] = 1
            for y in range(top, bottom):
                for x in range(left, right):
                    level = level_HW[y, x]
                    if x + 1 < right:
                        count_KK[level, level_HW[y, x + 1]] += 1
                    if y + 1 < bottom:
                        count_KK[level, level_HW[y + 1, x]] += 1
                        if x + 1 < right:
                            count_KK[level, level_HW[y + 1, x + 1]] += 1
                        if x > left:
                            count_KK[level, level_HW[y + 1, x - 1]] += 1
