"""Texture as radiomics describes it: statistics of which grey levels stand beside one another."""

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from dpkd.config import Config
from dpkd.priors.base import grid_size, mirror
from dpkd.priors.codecs import ByteCodec, Map
from dpkd.priors.image_views import Picture

LEVELS = 8


class Glcm(Config):
    """Contrast, homogeneity, energy, entropy and correlation in a cell every `stride` pixels: five channels in [0, 1].

    Of the cell's grey-level co-occurrence matrix P (Haralick et al. 1973) with 8 levels of luma, counted both ways over
    neighbours at 0, 45, 90 and 135 degrees within the cell. With i, j in 0..7: contrast √(Σ P (i-j)² / 49),
    homogeneity Σ P / (1 + (i-j)²), energy √(Σ P²), entropy -Σ P log P / log 64, (1 + correlation) / 2; an even cell has
    correlation 1.
    """

    kind: Literal["glcm"] = "glcm"
    stride: int = Field(16, ge=2)

    name: ClassVar[str] = "glcm"
    version: ClassVar[int] = 1
    channels: ClassVar[int] = 5
    nearest: ClassVar[bool] = False
    codec: ClassVar[ByteCodec] = ByteCodec()

    def map(self, picture: Picture) -> Map:
        """The five statistics, float32 HW5."""
        from dpkd.priors.catalogue.cooccurrence import cooccurrence_HWKK  # noqa: PLC0415 (numba must not load with the settings)

        level_HW = np.right_shift(picture.grey8_HW, 5, dtype=np.uint8)
        p_HWKK = cooccurrence_HWKK(level_HW, levels=LEVELS, size=grid_size(picture, self.stride))
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

    def flip(self, map_HWC: Map) -> Map:
        """The map of the mirrored image."""
        return mirror(map_HWC)
