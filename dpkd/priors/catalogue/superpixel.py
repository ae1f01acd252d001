"""Which pixels belong together: superpixels."""

from typing import ClassVar, Literal

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import Field

from dpkd.config import Config
from dpkd.priors.base import ImageViews, PriorDefaults, grid_size
from dpkd.priors.codecs import LABELS, Codec, Map


class Superpixel(PriorDefaults, Config):
    """Region labels 0, 1, ..., one channel of int32, a cell every `stride` pixels.

    F-DBSCAN superpixels of the Lab image (Loke et al. 2021, "Accelerated superpixel image segmentation with a
    parallelized DBSCAN algorithm"), read at the centre of each cell. A label means nothing beyond its image.
    """

    kind: Literal["superpixel"] = "superpixel"
    region_px: int = Field(16, ge=2)
    """Side of a mean region, in pixels of the image: 196 regions at 224 x 224, 28 at 84 x 84."""
    stride: int = Field(4, ge=1)

    channels: ClassVar[int] = 1
    nearest: ClassVar[bool] = True
    codec: ClassVar[Codec] = LABELS

    def map(self, image: ImageViews) -> Map:
        label_HW = _regions(image, self.region_px)
        height, width = grid_size(image, self.stride)
        rows = ((np.arange(height) + 0.5) * label_HW.shape[0] / height).astype(np.intp)  # the middle of each cell
        columns = ((np.arange(width) + 0.5) * label_HW.shape[1] / width).astype(np.intp)
        _, compact = np.unique(label_HW[np.ix_(rows, columns)], return_inverse=True)
        return compact.reshape(height, width, 1).astype(np.int32)


def _regions(image: ImageViews, region_px: int) -> npt.NDArray[np.int32]:
    """Labels of all pixels; an image of less than two regions is one."""
    height, width = image.size
    num_regions = round(height * width / region_px**2)
    if num_regions < 2 or min(height, width) < 8:  # ScanSegment reads past its buffers where it finds no cluster
        return np.zeros((height, width), np.int32)
    segment = cv2.ximgproc.createScanSegment(width, height, num_regions, 1, True)
    segment.iterate(image.lab8_HWC.copy())  # a fresh array: ScanSegment blurs its input in place, locked or not
    return np.asarray(segment.getLabels(), np.int32)
