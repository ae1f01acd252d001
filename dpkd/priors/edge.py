"""Where boundaries are: the colour gradient, over scales."""

from typing import ClassVar, Literal

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import Field

from dpkd.priors.codecs import JpegCodec, Map
from dpkd.priors.extractor import grid_size, mirror
from dpkd.priors.picture import Picture
from dpkd.section import Section

Image = npt.NDArray[np.float32]

FULL_SCALE = 64.0
"""Edge strength, in units of Lab, that is stored as 1."""


class Edge(Section):
    """Edge strength in [0, 1], one channel, a cell every `stride` pixels.

    With the structure tensor J = Σ_c w_c² (∇G_s∗I_c)(∇G_s∗I_c)ᵀ of the Lab image (Di Zenzo 1986), the strength at
    scale s is e_s = s·√λ_max(J) (Lindeberg 1998, γ-normalised, γ = 1); E is their mean, and the map √min(E/64, 1).
    """

    kind: Literal["edge"] = "edge"
    scales: tuple[float, ...] = Field((1.5, 3.0), min_length=1)
    """Standard deviations of the Gaussians, in pixels."""
    chroma: float = Field(3.0, gt=0)
    """Weight of the colour channels a and b against lightness."""
    smooth: bool = False
    """Smooths the image first, not across edges (domain transform, Gastal & Oliveira 2011): better, twice the time."""
    stride: int = Field(4, ge=1)

    name: ClassVar[str] = "edge"
    version: ClassVar[int] = 1
    channels: ClassVar[int] = 1
    nearest: ClassVar[bool] = False
    codec: ClassVar[JpegCodec] = JpegCodec()

    def map(self, picture: Picture) -> Map:
        """Edge strength of an image, float32 HW1."""
        if self.smooth:
            picture = Picture(np.asarray(cv2.ximgproc.dtFilter(picture.rgb_HWC, picture.rgb_HWC, 20, 60), np.uint8))
        weights_C = (1.0, self.chroma, self.chroma)
        total_HW = sum(_strength(picture.lab_HWC, scale, weights_C) for scale in self.scales)
        strength_HW = np.sqrt(np.minimum(total_HW * np.float32(1 / (FULL_SCALE * len(self.scales))), np.float32(1)))
        height, width = grid_size(picture, self.stride)
        return cv2.resize(strength_HW, (width, height), interpolation=cv2.INTER_AREA)[:, :, None]

    def flip(self, map_HWC: Map) -> Map:
        """The map of the mirrored image."""
        return mirror(map_HWC)


def _strength(lab_HWC: Image, scale: float, weights_C: tuple[float, ...]) -> Image:
    """Square root of the larger eigenvalue of the structure tensor, times the scale; HW."""
    smooth_HWC = cv2.GaussianBlur(lab_HWC, (0, 0), scale)
    dx_HWC = cv2.sepFilter2D(smooth_HWC, -1, np.array([-0.5, 0, 0.5]), np.array([1.0]))
    dy_HWC = cv2.sepFilter2D(smooth_HWC, -1, np.array([1.0]), np.array([-0.5, 0, 0.5]))
    square_1C = np.square(np.array([weights_C], np.float32))
    product_HWC = smooth_HWC  # its memory: fresh memory costs more than the arithmetic
    xx_HW = cv2.transform(cv2.multiply(dx_HWC, dx_HWC, product_HWC), square_1C)
    yy_HW = cv2.transform(cv2.multiply(dy_HWC, dy_HWC, product_HWC), square_1C)
    xy_HW = cv2.transform(cv2.multiply(dx_HWC, dy_HWC, product_HWC), square_1C)
    root_HW = cv2.magnitude(cv2.subtract(xx_HW, yy_HW), 2 * xy_HW)
    return np.float32(scale) * np.sqrt((xx_HW + yy_HW + root_HW) * np.float32(0.5))
