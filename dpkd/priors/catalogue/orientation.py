"""Which way structure runs, and how clearly: the structure tensor of each cell."""

from typing import ClassVar, Literal

import cv2
import numpy as np
from pydantic import Field

from dpkd.config import Config
from dpkd.priors.base import ImageViews, PriorDefaults, grid_size, mirror
from dpkd.priors.catalogue.kernels import cell_means
from dpkd.priors.codecs import BYTES, Codec, Map

NOISE = 16.0
"""Squared gradient, in grey levels a pixel, up to which a cell counts as without structure."""


class Orientation(PriorDefaults, Config):
    """Coherence, (1 + cos 2θ) / 2 and (1 + sin 2θ) / 2 for a cell every `stride` pixels, three channels in [0, 1].

    With the mean of the structure tensor of luma over the cell, [[a, c], [c, b]] (Bigün & Granlund 1987; Sobel
    gradients), m = √((a-b)² + 4c²): coherence is m / (a + b), cos 2θ = (a-b) / m and sin 2θ = 2c / m, θ the direction
    of the gradient, y down. A small constant keeps cells without structure at coherence 0 and both angles at 0.5.
    """

    kind: Literal["orientation"] = "orientation"
    stride: int = Field(16, ge=2)

    channels: ClassVar[int] = 3
    codec: ClassVar[Codec] = BYTES

    def map(self, image: ImageViews) -> Map:
        if min(image.size) < 3:  # too thin for a gradient
            dx_HW = dy_HW = np.zeros(image.size, np.float32)
        else:  # Sobel's, int16, is 8 times the slope
            dx_HW, dy_HW = (np.float32(1 / 8) * slope_HW for slope_HW in cv2.spatialGradient(image.grey8_HW))
        tensor_HWC = cv2.merge([cv2.multiply(dx_HW, dx_HW), cv2.multiply(dy_HW, dy_HW), cv2.multiply(dx_HW, dy_HW)])
        xx_HW, yy_HW, xy_HW = np.moveaxis(cell_means(np.asarray(tensor_HWC), grid_size(image, self.stride)), 2, 0)
        cos_HW, sin_HW = xx_HW - yy_HW, 2 * xy_HW
        length_HW = np.sqrt(cos_HW**2 + sin_HW**2)
        coherence_HW = length_HW / (xx_HW + yy_HW + np.float32(NOISE))
        half_HW = np.float32(0.5) / (length_HW + np.float32(1e-3 * NOISE))
        return np.stack([coherence_HW, 0.5 + cos_HW * half_HW, 0.5 + sin_HW * half_HW], axis=2).astype(np.float32)

    def flip(self, map_HWC: Map) -> Map:
        """The map of the mirrored image: mirrored, with sin 2θ negated."""
        flipped_HWC = mirror(map_HWC)
        flipped_HWC[:, :, 2] = 1 - flipped_HWC[:, :, 2]
        return flipped_HWC
