"""Where things are round: fast radial symmetry."""

from typing import ClassVar, Literal

import cv2
import numpy as np
from pydantic import Field

from dpkd.config import Config
from dpkd.priors.base import ImageViews, PriorDefaults, grid_size
from dpkd.priors.catalogue.kernels import Kernel, cell_means
from dpkd.priors.codecs import Codec, JpegCodec, Map

WEAKEST = 4.0
"""Gradient, in grey levels a pixel, below which a pixel does not vote."""


class Symmetry(PriorDefaults, Config):
    """Radial symmetry in [0, 1], one channel, a cell every `stride` pixels: bright at the centres of round things.

    Loy & Zelinsky 2003, "Fast radial symmetry for detecting points of interest", for bright and dark discs alike: at
    each radius n, pixels vote n pixels along and against their gradient, F = (|O|/k)^α · |M|/k smoothed by a Gaussian
    of n/4, k = 9.9 (8 for n = 1); here |O| is clipped at k. The map is √min(S, 1), S the mean over the radii.
    """

    kind: Literal["symmetry"] = "symmetry"
    radii: tuple[int, ...] = Field((4, 8, 12, 16), min_length=1)
    """In pixels of the image."""
    strictness: float = Field(2.0, ge=1)
    """α: how much more a point counts that is seen from all around."""
    stride: int = Field(8, ge=1)

    channels: ClassVar[int] = 1
    codec: ClassVar[Codec] = JpegCodec()

    def map(self, image: ImageViews) -> Map:
        total_HW = np.zeros(image.size, np.float32)
        if min(image.size) >= 3:
            dx_HW, dy_HW = cv2.spatialGradient(image.grey8_HW)
            for radius in self.radii:
                votes_HW, amounts_HW = radial_votes(dx_HW, dy_HW, radius)
                most = 8.0 if radius == 1 else 9.9
                share_HW = np.minimum(np.abs(votes_HW) * np.float32(1 / most), np.float32(1))
                point_HW = share_HW ** np.float32(self.strictness) * np.abs(amounts_HW) * np.float32(1 / most)
                total_HW += cv2.GaussianBlur(point_HW, (0, 0), 0.25 * radius)
        strength_HW = total_HW * np.float32(1 / len(self.radii))
        return cell_means(np.sqrt(np.minimum(strength_HW, np.float32(1))), grid_size(image, self.stride))


@Kernel
def radial_votes(dx_HW, dy_HW, radius):  # type: ignore[no-untyped-def]
    """Orientation and magnitude projection at one radius, float32 HW, of a Sobel gradient int16 (8 times the slope)."""
    votes_HW, amounts_HW = np.zeros(dx_HW.shape, np.float32), np.zeros(dx_HW.shape, np.float32)
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
    return votes_HW, amounts_HW
