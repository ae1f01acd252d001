"""Texture as radiomics describes it: statistics of the grey levels of neighbours."""

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from dpkd.config import Config
from dpkd.priors.base import ImageViews, PriorDefaults, grid_size
from dpkd.priors.catalogue.kernels import Kernel
from dpkd.priors.codecs import BYTES, Codec, Map

LEVELS = 8


class Glcm(PriorDefaults, Config):
    """Contrast, homogeneity, energy, entropy and correlation in a cell every `stride` pixels: five channels in [0, 1].

    Of the cell's grey-level co-occurrence matrix P (Haralick et al. 1973) with 8 levels of luma, counted both ways over
    neighbours at 0, 45, 90 and 135 degrees within the cell. With i, j in 0..7: contrast √(Σ P (i-j)² / 49),
    homogeneity Σ P / (1 + (i-j)²), energy √(Σ P²), entropy -Σ P log P / log 64, (1 + correlation) / 2; an even cell has
    correlation 1.
    """

    kind: Literal["glcm"] = "glcm"
    stride: int = Field(16, ge=2)

    channels: ClassVar[int] = 5
    codec: ClassVar[Codec] = BYTES

    def map(self, image: ImageViews) -> Map:
        level_HW = np.right_shift(image.grey8_HW, 5, dtype=np.uint8)
        size = grid_size(image, self.stride)
        rows, columns = (  # whole pixels: the nearest borders where the grid does not divide the image
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
    """Counts the pairs of levels of neighbours within each cell, one way; `rows` and `columns` are borders of cells."""
    for i in range(len(rows) - 1):
        for j in range(len(columns) - 1):
            top, bottom, left, right = rows[i], rows[i + 1], columns[j], columns[j + 1]
            count_KK = count_HWKK[i, j]
            if bottom - top == 1 and right - left == 1:  # a single pixel is its own neighbour
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
