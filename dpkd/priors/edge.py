"""Where boundaries are: the colour gradient, over scales."""

from typing import ClassVar, Literal

import cv2
import numpy as np
from pydantic import Field

from dpkd.priors.cells import cell_means
from dpkd.priors.codecs import JpegCodec, Map
from dpkd.priors.extractor import grid_size, mirror
from dpkd.priors.picture import Picture
from dpkd.section import Section

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
        from dpkd.priors.edge_strength import add_edge_strength  # noqa: PLC0415 (numba must not load with the settings)

        if self.smooth:
            picture = Picture(np.asarray(cv2.ximgproc.dtFilter(picture.rgb_HWC, picture.rgb_HWC, 20, 60), np.uint8))
        weights = (1.0, self.chroma, self.chroma)
        planes, total_HW = cv2.split(picture.lab_HWC), np.zeros(picture.size, np.float32)
        for scale in self.scales:
            smooth = [np.asarray(cv2.GaussianBlur(plane_HW, (0, 0), scale), np.float32) for plane_HW in planes]
            add_edge_strength(smooth, weights=weights, scale=scale, total_HW=total_HW)
        strength_HW = np.sqrt(np.minimum(total_HW * np.float32(1 / (FULL_SCALE * len(self.scales))), np.float32(1)))
        return cell_means(strength_HW, grid_size(picture, self.stride))

    def flip(self, map_HWC: Map) -> Map:
        """The map of the mirrored image."""
        return mirror(map_HWC)
