"""Which pixels belong together: superpixels."""

from typing import ClassVar, Literal

import cv2
import numpy as np
from pydantic import Field

from dpkd.config import Config
from dpkd.priors.base import ImageViews, PriorDefaults, grid_size
from dpkd.priors.codecs import LABELS, Codec, Map


class Superpixel(PriorDefaults, Config):
    """Region labels 0, 1, ..., one channel of int32, a cell every `stride` pixels.

    F-DBSCAN superpixels of the Lab image (Loke et al. 2021, "Accelerated superpixel image segmentation with a
    parallelized DBSCAN algorithm"), read at the centre of each cell. A label means nothing beyond its image; an image
    of less than two regions is one.
    """

    kind: Literal["superpixel"] = "superpixel"
    region_px: int = Field(16, ge=2)
    """Side of a mean region, in pixels of the image: 196 regions at 224 x 224, 28 at 84 x 84."""
    stride: int = Field(4, ge=1)

    channels: ClassVar[int] = 1
    nearest: ClassVar[bool] = True
    codec: ClassVar[Codec] = LABELS

    def map(self, image: ImageViews) -> Map:
        height, width = image.size
        num_regions = round(height * width / self.region_px**2)
        label_HW = np.zeros((height, width), np.int32)
        if num_regions >= 2 and min(height, width) >= 8:  # ScanSegment reads past its buffers where it finds no cluster
            segment = cv2.ximgproc.createScanSegment(width, height, num_regions, 1, True)
            segment.iterate(image.lab8_HWC.copy())  # a fresh array: ScanSegment blurs its input in place, locked or not
            label_HW = np.asarray(segment.getLabels(), np.int32)
        num_rows, num_columns = grid_size(image, self.stride)
        rows = ((np.arange(num_rows) + 0.5) * height / num_rows).astype(np.intp)  # the middle of each cell
        columns = ((np.arange(num_columns) + 0.5) * width / num_columns).astype(np.intp)
        _, compact = np.unique(label_HW[np.ix_(rows, columns)], return_inverse=True)
        return compact.reshape(num_rows, num_columns, 1).astype(np.int32)
