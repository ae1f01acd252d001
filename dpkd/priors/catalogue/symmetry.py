"""Where things are round: fast radial symmetry."""

from typing import ClassVar, Literal

import cv2
import numpy as np
from pydantic import Field

from dpkd.config import Config
from dpkd.priors.base import grid_size, mirror
from dpkd.priors.catalogue.cells import cell_means
from dpkd.priors.codecs import JpegCodec, Map
from dpkd.priors.image_views import Picture


class Symmetry(Config):
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

    name: ClassVar[str] = "symmetry"
    version: ClassVar[int] = 1
    channels: ClassVar[int] = 1
    nearest: ClassVar[bool] = False
    codec: ClassVar[JpegCodec] = JpegCodec()

    def map(self, picture: Picture) -> Map:
        """Radial symmetry, float32 HW1."""
        from dpkd.priors.catalogue.radial_votes import radial_votes  # noqa: PLC0415 (numba must not load with the settings)

        total_HW = np.zeros(picture.size, np.float32)
        if min(picture.size) >= 3:
            dx_HW, dy_HW = (np.asarray(each, np.int16) for each in cv2.spatialGradient(picture.grey8_HW))
            for radius in self.radii:
                votes_HW, amounts_HW = radial_votes(dx_HW, dy_HW, radius)
                most = 8.0 if radius == 1 else 9.9
                share_HW = np.minimum(np.abs(votes_HW) * np.float32(1 / most), np.float32(1))
                point_HW = share_HW ** np.float32(self.strictness) * np.abs(amounts_HW) * np.float32(1 / most)
                total_HW += cv2.GaussianBlur(point_HW, (0, 0), 0.25 * radius)
        strength_HW = total_HW * np.float32(1 / len(self.radii))
        return cell_means(np.sqrt(np.minimum(strength_HW, np.float32(1))), grid_size(picture, self.stride))

    def flip(self, map_HWC: Map) -> Map:
        """The map of the mirrored image."""
        return mirror(map_HWC)
