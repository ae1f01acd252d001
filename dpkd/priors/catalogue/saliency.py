"""Figure and ground by minimum barrier saliency."""

from collections.abc import Sequence
from functools import lru_cache
from typing import ClassVar, Literal

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import Field

from dpkd.priors.base import ImageViews, PriorConfig, grid_size
from dpkd.priors.catalogue.kernels import Kernel
from dpkd.priors.codecs import Codec, JpegCodec, Map

FRAME_SHARE = 0.1
"""Width of the four background strips, as a share of the image's side."""
LOWEST_THRESHOLD = 0.1
"""Minimum threshold, so that noise on a uniform ground is not a figure."""


class Saliency(PriorConfig):
    """Saliency in [0, 1], one channel, a cell every `stride` pixels.

    After MB+ of Zhang et al. 2015 ("Minimum barrier salient object detection at 80 FPS"): the minimum barrier distance
    of each pixel to the frame of the image, plus its Mahalanobis distance to the colours of the strips along the frame,
    weighted towards the centre and sharpened by a sigmoid. Differences from the paper: the weight of the centre is
    half; the sigmoid is 0.5 at the image's threshold by Otsu (1979), so that 0.5 separates figure from ground for one
    object or several; morphological smoothing is omitted.
    """

    kind: Literal["saliency"] = "saliency"
    working_px: int = Field(112, ge=16)
    """Longer side of the image for the computation; smaller images keep their size."""
    passes: int = Field(3, ge=1)
    """Number of raster scans of the distance transform."""
    centre: float = Field(0.5, ge=0, le=1)
    """Loss of a corner relative to the centre: 0 none, 1 all."""
    sharpness: float = Field(20.0, gt=0)
    """Slope of the sigmoid."""
    stride: int = Field(4, ge=1)

    version: ClassVar[int] = 2
    channels: ClassVar[int] = 1
    codec: ClassVar[Codec] = JpegCodec(quality=80)

    def map(self, image: ImageViews) -> Map:
        share = min(1.0, self.working_px / max(image.size))
        height, width = (max(1, round(side * share)) for side in image.size)
        small_HWC = cv2.resize(image.rgb_HWC, (width, height), interpolation=cv2.INTER_AREA)
        lab_HWC = np.asarray(cv2.cvtColor(small_HWC, cv2.COLOR_RGB2Lab), np.uint8)
        rows, columns = max(1, round(FRAME_SHARE * height)), max(1, round(FRAME_SHARE * width))
        strips = [lab_HWC[:rows], lab_HWC[-rows:], lab_HWC[:, :columns], lab_HWC[:, -columns:]]
        from_strip_RHW = mahalanobis(lab_HWC, strips)
        from_strip_RHW /= np.maximum(from_strip_RHW.max((1, 2), keepdims=True), np.float32(1e-6))
        from_frame_HW = from_strip_RHW.sum(0) - from_strip_RHW.max(0)  # without the strip that the figure touches
        distance_HW = _unit(barrier_distance(lab_HWC, self.passes).astype(np.float32)) + _unit(from_frame_HW)
        distance_HW = _unit(distance_HW * _centred(height, width, self.centre))

        level, _ = cv2.threshold(np.rint(distance_HW * 255).astype(np.uint8), 0, 255, cv2.THRESH_OTSU)
        turn = np.float32(max(level / 255, LOWEST_THRESHOLD))
        saliency_HW = 1 / (1 + np.exp(np.float32(self.sharpness) * (turn - distance_HW)))
        height, width = grid_size(image, self.stride)
        method = cv2.INTER_AREA if height < saliency_HW.shape[0] else cv2.INTER_LINEAR
        return cv2.resize(saliency_HW, (width, height), interpolation=method)[:, :, None]


@lru_cache(maxsize=16)
def _centred(height: int, width: int, loss: float) -> npt.NDArray[np.float32]:
    """Weights from 1 at the centre, decreasing linearly to 1 - `loss` in the corners."""
    y_H, x_W = ((np.arange(side, dtype=np.float32) + 0.5) / side - 0.5 for side in (height, width))
    away_HW = np.sqrt(y_H[:, None] ** 2 + x_W**2) * np.float32(np.sqrt(2))
    return np.asarray(1 - np.float32(loss) * away_HW, np.float32)


def _unit(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The values divided by the maximum; zeros stay zeros."""
    largest = values.max()
    return values / largest if largest > 0 else values


@Kernel
def barrier_distance(image_HWC, passes):  # type: ignore[no-untyped-def]
    """Minimum barrier distance of each pixel of a uint8 image to the frame, summed over the channels; int32 HW.

    The barrier of a path is its highest minus its lowest value. The result of raster scanning (Zhang et al. 2015,
    algorithm 1) is never below the exact distance, and close to it after three passes.
    """
    height, width, channels = image_HWC.shape
    total_HW = np.zeros((height, width), np.int32)
    for channel in range(channels):
        value_HW = image_HWC[:, :, channel].astype(np.int32)
        highest_HW, lowest_HW = value_HW.copy(), value_HW.copy()
        distance_HW = np.full((height, width), 1 << 20, np.int32)
        distance_HW[0], distance_HW[-1] = 0, 0
        distance_HW[:, 0], distance_HW[:, -1] = 0, 0
        for scan in range(passes):
            step = 1 if scan % 2 == 0 else -1  # down and right, then up and left, and so on
            first_row, first_column = (1, 1) if step == 1 else (height - 2, width - 2)
            for i in range(height - 2):
                y = first_row + i * step
                for j in range(width - 2):
                    x = first_column + j * step
                    for from_y, from_x in ((y - step, x), (y, x - step)):
                        highest = max(highest_HW[from_y, from_x], value_HW[y, x])
                        lowest = min(lowest_HW[from_y, from_x], value_HW[y, x])
                        if highest - lowest < distance_HW[y, x]:
                            distance_HW[y, x] = highest - lowest
                            highest_HW[y, x], lowest_HW[y, x] = highest, lowest
        total_HW += distance_HW
    return total_HW


def mahalanobis(image_HWC: npt.NDArray[np.uint8], regions: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float32]:
    """Mahalanobis distance of each pixel to the colours of each region (HWC); float32 RHW.

    Noise with a deviation of one level is added to each region's covariance.
    """
    flags = cv2.COVAR_NORMAL | cv2.COVAR_ROWS | cv2.COVAR_SCALE
    moments = [cv2.calcCovarMatrix(region_HWC.reshape(-1, 3), None, flags) for region_HWC in regions]  # type: ignore[call-overload]
    precision_RCC = np.linalg.inv(np.stack([covariance_CC for covariance_CC, _ in moments]) + np.eye(3))
    mean_RC = np.concatenate([mean_1C for _, mean_1C in moments]).astype(np.float32)
    planes_CHW = np.stack(cv2.split(image_HWC))
    return np.asarray(_distances(planes_CHW, mean_RC, precision_RCC.astype(np.float32)), np.float32)


@Kernel
def _distances(image_CHW, mean_RC, precision_RCC):  # type: ignore[no-untyped-def]
    _, height, width = image_CHW.shape
    distance_RHW = np.empty((len(mean_RC), height, width), np.float32)
    for r in range(len(mean_RC)):
        m0, m1, m2 = mean_RC[r]
        p = precision_RCC[r]
        p00, p11, p22 = p[0, 0], p[1, 1], p[2, 2]
        p01, p02, p12 = 2 * p[0, 1], 2 * p[0, 2], 2 * p[1, 2]
        for y in range(height):
            first, second, third, distance = image_CHW[0, y], image_CHW[1, y], image_CHW[2, y], distance_RHW[r, y]
            for x in range(width):
                a, b, c = np.float32(first[x]) - m0, np.float32(second[x]) - m1, np.float32(third[x]) - m2
                square = a * (p00 * a + p01 * b + p02 * c) + b * (p11 * b + p12 * c) + c * c * p22
                distance[x] = np.sqrt(max(square, np.float32(0)))
    return distance_RHW
