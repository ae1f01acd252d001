"""Colour: mean and deviation in each cell, and histograms of hue."""

from typing import ClassVar, Literal

import cv2
import numpy as np
from pydantic import Field

from dpkd.priors.base import ImageViews, PriorConfig, grid_size, lab
from dpkd.priors.catalogue.kernels import cell_histogram, cell_means
from dpkd.priors.codecs import BYTES, NIBBLES, Codec, Map

LOWEST, SPAN = (0.0, -128.0, -128.0), (100.0, 256.0, 256.0)
"""Of L*, a* and b*: the value stored as 0, and the distance from it to the value stored as 1."""
LARGEST_DEVIATION = 50.0
"""In units of Lab; it and larger deviations are stored as 1."""


class Colour(PriorConfig):
    """Mean of L*, a* and b*, then their standard deviations, in a cell every `stride` pixels: six channels in [0, 1].

    Stored as L/100, (a + 128)/256, (b + 128)/256 and deviation/50. Cells from 8 pixels are those of the image at half
    size. The colours are those of the original image: a target for views with unchanged colours.
    """

    kind: Literal["colour"] = "colour"
    grey_world: bool = False
    """First scales red, green and blue to one mean (von Kries; Buchsbaum 1980), for images with different lamps."""
    stride: int = Field(16, ge=2)

    version: ClassVar[int] = 2
    channels: ClassVar[int] = 6
    codec: ClassVar[Codec] = BYTES

    def map(self, image: ImageViews) -> Map:
        if self.grey_world:
            mean_C = np.maximum(image.rgb_HWC.reshape(-1, 3).mean(0), 1)
            scaled_HWC = image.rgb_HWC * (mean_C.mean() / mean_C).astype(np.float32)
            image = ImageViews(np.rint(np.minimum(scaled_HWC, 255)).astype(np.uint8))
        size = grid_size(image, self.stride)
        lab_HWC = image.half_lab_HWC if self.stride >= 8 else lab(image.rgb_HWC)
        mean_HWC = cell_means(lab_HWC, size)
        variance_HWC = cell_means(np.asarray(cv2.multiply(lab_HWC, lab_HWC), np.float32), size) - mean_HWC**2
        deviation_HWC = np.sqrt(np.maximum(variance_HWC, 0)) * np.float32(1 / LARGEST_DEVIATION)
        scaled_HWC = (mean_HWC - np.asarray(LOWEST, np.float32)) / np.asarray(SPAN, np.float32)
        return np.clip(np.concatenate([scaled_HWC, deviation_HWC], axis=2), 0, 1)


class Hue(PriorConfig):
    """Square root of each hue's share of a cell every `stride` pixels, by saturation: `bins` channels in [0, 1].

    Hue and saturation are those of HSV (Smith 1978; weights as in van de Weijer et al. 2006, because grey has no hue).
    Bin k starts at k · 360/bins degrees, red at 0. The squares sum to the mean saturation of the cell.
    """

    kind: Literal["hue"] = "hue"
    bins: int = Field(12, ge=2, le=180)
    stride: int = Field(16, ge=2)

    codec: ClassVar[Codec] = NIBBLES

    @property
    def channels(self) -> int:
        return self.bins

    def map(self, image: ImageViews) -> Map:
        hue_HW, saturation_HW, _ = cv2.split(cv2.cvtColor(image.rgb_HWC, cv2.COLOR_RGB2HSV_FULL))
        bin_HW = np.asarray(cv2.LUT(hue_HW, (np.arange(256) * self.bins // 256).astype(np.uint8)), np.uint8)
        size, weight_HW = grid_size(image, self.stride), np.asarray(saturation_HW, np.uint8)
        histogram_HWC = cell_histogram(bin_HW, weight_HW, num_bins=self.bins, size=size)
        return np.sqrt(histogram_HWC * np.float32(1 / 255))
