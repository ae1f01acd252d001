"""Which way edges run: histograms of oriented gradients."""

from typing import ClassVar, Literal

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import Field

from dpkd.priors.codecs import Map, NibbleCodec
from dpkd.priors.extractor import grid_size
from dpkd.section import Section


class Hog(Section):
    """A histogram of gradient orientation for each cell of about `cell` pixels: `bins` channels in [0, 1].

    Dalal & Triggs 2005, as MaskFeat (Wei et al. 2022) takes it for a target: central differences, the channel of the largest
    gradient, unsigned orientation, magnitudes shared between the two nearest bins, each cell divided by its l2 norm.
    Sharing also makes the map of a mirrored image exactly the map with its bins reversed.
    """

    kind: Literal["hog"] = "hog"
    bins: int = Field(9, ge=2)
    cell: int = Field(8, ge=2)

    version: ClassVar[int] = 1
    nearest: ClassVar[bool] = False
    codec: ClassVar[NibbleCodec] = NibbleCodec()

    @property
    def channels(self) -> int:
        """One channel a bin; bin k is centred at (k + 0.5) · 180 / bins degrees."""
        return self.bins

    def map(self, image_HWC: npt.NDArray[np.uint8]) -> Map:
        """Oriented gradients of an RGB image, float32 HWC."""
        height, width = grid_size(image_HWC, self.cell)
        votes_HWC = _votes(*_gradient(image_HWC), self.bins)
        histogram_HWC = cv2.resize(votes_HWC, (width, height), interpolation=cv2.INTER_AREA)
        histogram_HWC = histogram_HWC.reshape(height, width, self.bins)
        norm_HW1 = np.sqrt(np.square(histogram_HWC).sum(2, keepdims=True) + np.float32(1e-10))
        return histogram_HWC / norm_HW1

    def flip(self, map_HWC: Map) -> Map:
        """The map of the mirrored image: mirrored, with the bins reversed."""
        return map_HWC[:, ::-1, ::-1]


def _gradient(image_HWC: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """The derivatives along x and y of the channel whose gradient is the largest, pixel by pixel; zero across the frame."""
    difference, one = np.array([-1.0, 0, 1]) / 255, np.array([1.0])
    dx_HWC = cv2.sepFilter2D(image_HWC, cv2.CV_32F, difference, one)
    dy_HWC = cv2.sepFilter2D(image_HWC, cv2.CV_32F, one, difference)
    largest_HW1 = np.argmax(dx_HWC * dx_HWC + dy_HWC * dy_HWC, axis=2)[:, :, None]
    dx_HW1 = np.take_along_axis(dx_HWC, largest_HW1, axis=2)
    dy_HW1 = np.take_along_axis(dy_HWC, largest_HW1, axis=2)
    return dx_HW1[:, :, 0], dy_HW1[:, :, 0]


def _votes(dx_HW: npt.NDArray[np.float32], dy_HW: npt.NDArray[np.float32], bins: int) -> npt.NDArray[np.float32]:
    """Each pixel's magnitude, shared between the two bins nearest to its orientation; HWC with `bins` channels."""
    magnitude_HW, angle_HW = cv2.cartToPolar(dx_HW, dy_HW)
    position_HW = angle_HW * np.float32(bins / np.pi) - np.float32(0.5)
    below_HW = np.floor(position_HW)
    share_HW = position_HW - below_HW
    below = below_HW.astype(np.int32).ravel() % bins
    votes = np.zeros((below.size, bins), np.float32)
    rows = np.arange(below.size)
    votes[rows, below] = (magnitude_HW * (1 - share_HW)).ravel()
    votes[rows, (below + 1) % bins] = (magnitude_HW * share_HW).ravel()
    return votes.reshape(*dx_HW.shape, bins)
