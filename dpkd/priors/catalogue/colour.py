"""What colour things have: mean and deviation of each cell."""

from typing import ClassVar, Literal

import cv2
import numpy as np
from pydantic import Field

from dpkd.config import Config
from dpkd.priors.base import ImageViews, PriorDefaults, grid_size
from dpkd.priors.catalogue.kernels import cell_means
from dpkd.priors.codecs import BYTES, Codec, Map

LOWEST, SPAN = (0.0, -128.0, -128.0), (100.0, 256.0, 256.0)
"""Of L*, a* and b*: what is stored as 0, and what more is stored as 1."""
LARGEST_DEVIATION = 50.0
"""In units of Lab; stored as 1, and larger ones with it."""


class Colour(PriorDefaults, Config):
    """Mean of L*, a* and b*, then their standard deviations, in a cell every `stride` pixels: six channels in [0, 1].

    Stored as L/100, (a + 128)/256, (b + 128)/256 and deviation/50. These are colours of the image as it is: a target
    for views whose colours are not changed.
    """

    kind: Literal["colour"] = "colour"
    grey_world: bool = False
    """Scales red, green and blue to one mean first (von Kries; Buchsbaum 1980), for images under lamps of all kinds."""
    stride: int = Field(16, ge=2)

    channels: ClassVar[int] = 6
    codec: ClassVar[Codec] = BYTES

    def map(self, image: ImageViews) -> Map:
        if self.grey_world:
            mean_C = np.maximum(image.rgb_HWC.reshape(-1, 3).mean(0), 1)
            scaled_HWC = image.rgb_HWC * (mean_C.mean() / mean_C).astype(np.float32)
            image = ImageViews(np.rint(np.minimum(scaled_HWC, 255)).astype(np.uint8))
        size, lab_HWC = grid_size(image, self.stride), image.lab_HWC
        mean_HWC = cell_means(lab_HWC, size)
        variance_HWC = cell_means(np.asarray(cv2.multiply(lab_HWC, lab_HWC), np.float32), size) - mean_HWC**2
        deviation_HWC = np.sqrt(np.maximum(variance_HWC, 0)) * np.float32(1 / LARGEST_DEVIATION)
        scaled_HWC = (mean_HWC - np.asarray(LOWEST, np.float32)) / np.asarray(SPAN, np.float32)
        return np.clip(np.concatenate([scaled_HWC, deviation_HWC], axis=2), 0, 1)
