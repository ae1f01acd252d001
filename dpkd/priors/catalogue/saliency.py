"""What stands out as figure: minimum barrier saliency."""

from typing import ClassVar, Literal

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import Field

from dpkd.config import Config
from dpkd.priors.base import grid_size, mirror
from dpkd.priors.codecs import JpegCodec, Map
from dpkd.priors.image_views import Picture

FRAME_SHARE = 0.1
"""Width of the four strips that stand for background, as a share of the image's side."""
LOWEST_THRESHOLD = 0.1


class Saliency(Config):
    """Saliency in [0, 1], one channel, a cell every `stride` pixels.

    After MB+ of Zhang et al. 2015 ("Minimum barrier salient object detection at 80 FPS"): the minimum barrier distance
    of each pixel to the frame of the image, plus its Mahalanobis distance to the colours of the strips along the frame,
    weighted towards the centre and sharpened by a sigmoid. Other than there, the centre weighs only half, and the
    sigmoid turns at Otsu's threshold (1979) of the image, so that 0.5 parts figure from ground in images of one object
    and of many; there is no morphological smoothing.
    """

    kind: Literal["saliency"] = "saliency"
    working_px: int = Field(112, ge=16)
    """Longer side at which it is computed; smaller images are taken as they are."""
    passes: int = Field(3, ge=1)
    """Raster scans of the distance transform."""
    centre: float = Field(0.5, ge=0, le=1)
    """What a corner loses to the centre: 0 nothing, 1 all."""
    sharpness: float = Field(20.0, gt=0)
    """Slope of the sigmoid."""
    stride: int = Field(4, ge=1)

    name: ClassVar[str] = "saliency"
    version: ClassVar[int] = 2
    channels: ClassVar[int] = 1
    nearest: ClassVar[bool] = False
    codec: ClassVar[JpegCodec] = JpegCodec(quality=80)

    def map(self, picture: Picture) -> Map:
        """Saliency of an image, float32 HW1."""
        from dpkd.priors.catalogue.frame_difference import mahalanobis  # noqa: PLC0415
        from dpkd.priors.catalogue.minimum_barrier import barrier_distance  # noqa: PLC0415 (numba must not load with the settings)

        lab_HWC = np.asarray(cv2.cvtColor(_shrink(picture.rgb_HWC, self.working_px), cv2.COLOR_RGB2Lab), np.uint8)
        distance_HW = _unit(barrier_distance(lab_HWC, self.passes).astype(np.float32))
        from_strip_RHW = np.stack([_unit(each_HW) for each_HW in mahalanobis(lab_HWC, _frame(lab_HWC))])
        from_frame_HW = from_strip_RHW.sum(0) - from_strip_RHW.max(0)  # not from the strip that the figure touches
        distance_HW = _unit(distance_HW + _unit(from_frame_HW))
        centre_HW = 1 - np.float32(self.centre) * (1 - _centre_weight(*lab_HWC.shape[:2]))
        distance_HW = _unit(distance_HW * centre_HW)
        saliency_HW = 1 / (1 + np.exp(np.float32(self.sharpness) * (_threshold(distance_HW) - distance_HW)))
        height, width = grid_size(picture, self.stride)
        shrinks = height < saliency_HW.shape[0]
        method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        return cv2.resize(saliency_HW, (width, height), interpolation=method)[:, :, None]

    def flip(self, map_HWC: Map) -> Map:
        """The map of the mirrored image."""
        return mirror(map_HWC)


def _shrink(image_HWC: npt.NDArray[np.uint8], longer_px: int) -> npt.NDArray[np.uint8]:
    """The image with its longer side at most `longer_px`."""
    height, width = image_HWC.shape[:2]
    scale = longer_px / max(height, width)
    if scale >= 1:
        return image_HWC
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(cv2.resize(image_HWC, size, interpolation=cv2.INTER_AREA), np.uint8)


def _frame(lab_HWC: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.uint8]]:
    """The strips along the four sides."""
    height, width = lab_HWC.shape[:2]
    rows, columns = max(1, round(FRAME_SHARE * height)), max(1, round(FRAME_SHARE * width))
    return [lab_HWC[:rows], lab_HWC[-rows:], lab_HWC[:, :columns], lab_HWC[:, -columns:]]


def _centre_weight(height: int, width: int) -> npt.NDArray[np.float32]:
    """1 at the centre, falling in a straight line to 0 in the corners."""
    y_H = (np.arange(height, dtype=np.float32) + 0.5) / height - 0.5
    x_W = (np.arange(width, dtype=np.float32) + 0.5) / width - 0.5
    return 1 - np.sqrt(y_H[:, None] ** 2 + x_W[None, :] ** 2) * np.float32(np.sqrt(2))


def _threshold(values_HW: npt.NDArray[np.float32]) -> np.float32:
    """Otsu's threshold of values in [0, 1]; never so low that noise on even ground would be figure."""
    level, _ = cv2.threshold(np.rint(values_HW * 255).astype(np.uint8), 0, 255, cv2.THRESH_OTSU)
    return np.float32(max(level / 255, LOWEST_THRESHOLD))


def _unit(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The values divided by the largest; zeros stay zeros."""
    largest = values.max()
    return values / largest if largest > 0 else values
