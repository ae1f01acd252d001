"""Fine texture: histograms of local binary patterns."""

from typing import ClassVar, Literal

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import Field

from dpkd.config import Config
from dpkd.priors.base import ImageViews, PriorDefaults, grid_size
from dpkd.priors.catalogue.kernels import Kernel, cell_histogram
from dpkd.priors.codecs import NIBBLES, Codec, Map

# Bilinear weights, in 1,024ths, of the pixels that a neighbour on the diagonal at radius 1 lies between. Whole numbers
# that add up to 1,024: neighbours as bright as the centre stay as bright.
CORNER, SIDE, CENTRE = 512, 212, 88


class Lbp(PriorDefaults, Config):
    """Square roots of the shares of ten patterns in a cell every `stride` pixels: ten channels in [0, 1].

    Rotation-invariant uniform patterns of 8 neighbours at radius 1 (Ojala, Pietikäinen & Mäenpää 2002, LBP^riu2_8,1)
    of luma: channels 0 to 8 count neighbours that are no darker than the centre, 9 is any pattern with more than two
    changes around the circle. No change of the light that keeps the order of the grey levels changes the map.
    """

    kind: Literal["lbp"] = "lbp"
    stride: int = Field(16, ge=2)

    channels: ClassVar[int] = 10
    codec: ClassVar[Codec] = NIBBLES

    def map(self, image: ImageViews) -> Map:
        pattern_HW = uniform_patterns(image.grey8_HW)
        return np.sqrt(cell_histogram(pattern_HW, num_bins=self.channels, size=grid_size(image, self.stride)))


def uniform_patterns(grey_HW: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The rotation-invariant uniform pattern of each pixel, 0 to 9; the frame is continued by its own pixels."""
    bit_KN = np.arange(256)[:, None] >> np.arange(8) & 1  # of each code of 8 bits
    num_changes_K = (bit_KN != np.roll(bit_KN, 1, axis=1)).sum(1)
    uniform_K = np.where(num_changes_K <= 2, bit_KN.sum(1), 9).astype(np.uint8)
    return np.asarray(_patterns(cv2.copyMakeBorder(grey_HW, 1, 1, 1, 1, cv2.BORDER_REPLICATE), uniform_K))


@Kernel
def _patterns(grey_HW, uniform_K):  # type: ignore[no-untyped-def]
    """The pattern of each pixel inside a frame of one."""
    height, width = grey_HW.shape[0] - 2, grey_HW.shape[1] - 2
    pattern_HW = np.empty((height, width), np.uint8)
    code_W = np.empty(width, np.uint8)
    for y in range(height):
        above, level, below = grey_HW[y], grey_HW[y + 1], grey_HW[y + 2]
        for x in range(width):
            a, b, c = np.int32(above[x]), np.int32(above[x + 1]), np.int32(above[x + 2])
            d, e, f = np.int32(level[x]), np.int32(level[x + 1]), np.int32(level[x + 2])
            g, h, i = np.int32(below[x]), np.int32(below[x + 1]), np.int32(below[x + 2])
            centre = e * (1024 - CENTRE)
            code = np.int32(f >= e) | np.int32(b >= e) << 2 | np.int32(d >= e) << 4 | np.int32(h >= e) << 6
            code |= np.int32(c * CORNER + (b + f) * SIDE >= centre) << 1
            code |= np.int32(a * CORNER + (b + d) * SIDE >= centre) << 3
            code |= np.int32(g * CORNER + (d + h) * SIDE >= centre) << 5
            code |= np.int32(i * CORNER + (f + h) * SIDE >= centre) << 7
            code_W[x] = np.uint8(code)
        for x in range(width):
            pattern_HW[y, x] = uniform_K[code_W[x]]
    return pattern_HW
