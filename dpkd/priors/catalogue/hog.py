"""Which way edges run: histograms of oriented gradients."""

from typing import ClassVar, Literal

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import Field

from dpkd.config import Config
from dpkd.priors.base import ImageViews, PriorDefaults, grid_size
from dpkd.priors.codecs import NIBBLES, Codec, Map


class Hog(PriorDefaults, Config):
    """A histogram of gradient orientation for each cell of about `cell` pixels: `bins` channels in [0, 1].

    Dalal & Triggs 2005, as MaskFeat (Wei et al. 2022) takes it for a target: central differences, the colour of the
    largest gradient, unsigned orientation, magnitudes shared by the two nearest bins, cells divided by their l2 norm.
    Sharing also makes the map of a mirrored image exactly the map with its bins reversed.
    """

    kind: Literal["hog"] = "hog"
    bins: int = Field(9, ge=2)
    cell: int = Field(8, ge=2)

    codec: ClassVar[Codec] = NIBBLES

    @property
    def channels(self) -> int:
        """One channel a bin; bin k is centred at (k + 0.5) · 180 / bins degrees."""
        return self.bins

    def map(self, image: ImageViews) -> Map:
        height, width = grid_size(image, self.cell)
        votes_CHW = _votes(*_gradient(image.rgb_HWC), self.bins)
        planes = [cv2.resize(votes_HW, (width, height), interpolation=cv2.INTER_AREA) for votes_HW in votes_CHW]
        histogram_HWC = np.stack(planes, axis=2)
        norm_HW1 = np.sqrt(np.square(histogram_HWC).sum(2, keepdims=True) + np.float32(1e-10))
        return histogram_HWC / norm_HW1

    def flip(self, map_HWC: Map) -> Map:
        """The map of the mirrored image: mirrored, with the bins reversed."""
        return np.ascontiguousarray(map_HWC[:, ::-1, ::-1])


def _gradient(image_HWC: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Derivatives along x and y of the colour whose gradient is the largest, at each pixel; zero across the frame."""
    # whole numbers: equal gradients stay equal, mirrored or not
    difference, one = np.array([-1.0, 0, 1]), np.array([1.0])
    dx_HW, *other_dx = cv2.split(cv2.sepFilter2D(image_HWC, cv2.CV_32F, difference, one))
    dy_HW, *other_dy = cv2.split(cv2.sepFilter2D(image_HWC, cv2.CV_32F, one, difference))
    square_HW = dx_HW * dx_HW + dy_HW * dy_HW
    for channel_dx, channel_dy in zip(other_dx, other_dy, strict=True):
        channel_square = channel_dx * channel_dx + channel_dy * channel_dy
        larger = (channel_square > square_HW).view(np.uint8)
        cv2.copyTo(channel_square, larger, square_HW)
        cv2.copyTo(channel_dx, larger, dx_HW)
        cv2.copyTo(channel_dy, larger, dy_HW)
    return np.asarray(dx_HW, np.float32), np.asarray(dy_HW, np.float32)


def _votes(dx_HW: npt.NDArray[np.float32], dy_HW: npt.NDArray[np.float32], bins: int) -> npt.NDArray[np.float32]:
    """Each pixel's magnitude, shared between the two bins nearest to its orientation; CHW with `bins` channels."""
    magnitude_HW, angle_HW = cv2.cartToPolar(dx_HW, dy_HW)
    position_HW = angle_HW * np.float32(bins / np.pi) + np.float32(bins - 0.5)
    below_HW = position_HW.astype(np.int32)
    upper_HW = magnitude_HW * (position_HW - below_HW)
    pixel_N = np.arange(dx_HW.size)
    below_N = (below_HW % bins).ravel()
    votes_CN = np.zeros((bins, dx_HW.size), np.float32)
    votes_CN[below_N, pixel_N] = (magnitude_HW - upper_HW).ravel()
    votes_CN[(below_N + 1) % bins, pixel_N] = upper_HW.ravel()
    return votes_CN.reshape(bins, *dx_HW.shape)
