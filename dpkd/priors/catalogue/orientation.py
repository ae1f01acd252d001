"""Orientation of structure: the structure tensor of each cell, and histograms of oriented gradients."""

from typing import ClassVar, Literal

import cv2
import numpy as np
from pydantic import Field

from dpkd.priors.base import ImageViews, PriorConfig, grid_size, mirror
from dpkd.priors.catalogue.kernels import cell_means
from dpkd.priors.codecs import BYTES, NIBBLES, Codec, Map

NOISE = 16.0
"""Squared gradient, in grey levels a pixel, below which a cell counts as structureless."""


class Orientation(PriorConfig):
    """Coherence, (1 + cos 2θ) / 2 and (1 + sin 2θ) / 2 for a cell every `stride` pixels, three channels in [0, 1].

    With [[a, c], [c, b]], the mean of luma's structure tensor over the cell (Bigün & Granlund 1987; Sobel gradients),
    and m = √((a-b)² + 4c²): coherence is m / (a + b), cos 2θ = (a-b) / m and sin 2θ = 2c / m, with θ the direction of
    the gradient, y down. A small constant gives structureless cells coherence 0 and both angles 0.5.
    """

    kind: Literal["orientation"] = "orientation"
    stride: int = Field(16, ge=2)

    channels: ClassVar[int] = 3
    codec: ClassVar[Codec] = BYTES

    def map(self, image: ImageViews) -> Map:
        size = grid_size(image, self.stride)
        xx_HW = yy_HW = xy_HW = np.zeros(size, np.float32)
        if min(image.size) >= 3:  # else too thin for a gradient; OpenCV's is 8 times the slope
            dx_HW, dy_HW = cv2.spatialGradient(image.grey8_HW)
            xx_HW, yy_HW, xy_HW = (
                cell_means(np.asarray(cv2.multiply(*pair, scale=1 / 64, dtype=cv2.CV_32F), np.float32), size)[:, :, 0]
                for pair in ((dx_HW, dx_HW), (dy_HW, dy_HW), (dx_HW, dy_HW))
            )
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


class Hog(PriorConfig):
    """A histogram of gradient orientation for each cell of about `cell` pixels: `bins` channels in [0, 1].

    Dalal & Triggs 2005, as the target of MaskFeat (Wei et al. 2022): central differences, the colour of the largest
    gradient, unsigned orientation, magnitudes shared by the two nearest bins, cells divided by their l2 norm. Bin k is
    centred at (k + 0.5) · 180 / bins degrees. Because of the sharing, the map of a mirrored image is exactly the
    mirrored map with reversed bins.
    """

    kind: Literal["hog"] = "hog"
    bins: int = Field(9, ge=2)
    cell: int = Field(8, ge=2)

    codec: ClassVar[Codec] = NIBBLES

    @property
    def channels(self) -> int:
        return self.bins

    def map(self, image: ImageViews) -> Map:
        # central differences, 0 at the border; integers, so that equal gradients stay equal in a mirrored image
        difference, one = np.array([-1.0, 0, 1]), np.array([1.0])
        dx_HWC = np.asarray(cv2.sepFilter2D(image.rgb_HWC, cv2.CV_32F, difference, one))
        dy_HWC = np.asarray(cv2.sepFilter2D(image.rgb_HWC, cv2.CV_32F, one, difference))
        largest_HW1 = (dx_HWC * dx_HWC + dy_HWC * dy_HWC).argmax(2, keepdims=True)
        dx_HW, dy_HW = (np.take_along_axis(slope_HWC, largest_HW1, 2)[:, :, 0] for slope_HWC in (dx_HWC, dy_HWC))

        # each pixel's magnitude, shared between the two bins nearest to its orientation
        magnitude_HW, angle_HW = cv2.cartToPolar(dx_HW, dy_HW)
        position_HW = angle_HW * np.float32(self.bins / np.pi) + np.float32(self.bins - 0.5)
        below_HW = position_HW.astype(np.int32)
        upper_HW = magnitude_HW * (position_HW - below_HW)
        below_N, pixel_N = (below_HW % self.bins).ravel(), np.arange(dx_HW.size)
        votes_CN = np.zeros((self.bins, dx_HW.size), np.float32)
        votes_CN[below_N, pixel_N] = (magnitude_HW - upper_HW).ravel()
        votes_CN[(below_N + 1) % self.bins, pixel_N] = upper_HW.ravel()

        height, width = grid_size(image, self.cell)
        planes = [
            cv2.resize(votes_N.reshape(dx_HW.shape), (width, height), interpolation=cv2.INTER_AREA)
            for votes_N in votes_CN
        ]
        histogram_HWC = np.stack(planes, axis=2)
        norm_HW1 = np.sqrt(np.square(histogram_HWC).sum(2, keepdims=True) + np.float32(1e-10))
        return histogram_HWC / norm_HW1

    def flip(self, map_HWC: Map) -> Map:
        """The map of the mirrored image: mirrored, with the bins reversed."""
        return np.ascontiguousarray(map_HWC[:, ::-1, ::-1])
