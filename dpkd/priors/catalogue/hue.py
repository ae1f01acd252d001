"""Which hues there are: histograms of hue, by how colourful each pixel is."""

from typing import ClassVar, Literal

import cv2
import numpy as np
from pydantic import Field

from dpkd.config import Config
from dpkd.priors.base import ImageViews, PriorDefaults, grid_size
from dpkd.priors.catalogue.kernels import cell_histogram
from dpkd.priors.codecs import NIBBLES, Codec, Map


class Hue(PriorDefaults, Config):
    """Square root of each hue's share of a cell every `stride` pixels, by saturation: `bins` channels in [0, 1].

    Hue and saturation are those of HSV (Smith 1978; van de Weijer et al. 2006 weigh hue so, since grey has none). Bin k
    holds hues from k · 360/bins degrees, red at 0. The squares add up to the mean saturation of the cell.
    """

    kind: Literal["hue"] = "hue"
    bins: int = Field(12, ge=2, le=180)
    stride: int = Field(16, ge=2)

    codec: ClassVar[Codec] = NIBBLES

    @property
    def channels(self) -> int:
        """One channel a bin."""
        return self.bins

    def map(self, image: ImageViews) -> Map:
        hue_HW, saturation_HW, _ = cv2.split(cv2.cvtColor(image.rgb_HWC, cv2.COLOR_RGB2HSV_FULL))
        bin_HW = np.asarray(cv2.LUT(hue_HW, (np.arange(256) * self.bins // 256).astype(np.uint8)), np.uint8)
        size, weight_HW = grid_size(image, self.stride), np.asarray(saturation_HW, np.uint8)
        histogram_HWC = cell_histogram(bin_HW, num_bins=self.bins, size=size, weight_HW=weight_HW)
        return np.sqrt(histogram_HWC * np.float32(1 / 255))
