"""Regions: superpixels, and an expert's masks and maps."""

from typing import ClassVar, Literal

import cv2
import numpy as np
from pydantic import Field

from dpkd.data.image_headers import BrokenImage
from dpkd.data.images import decode_mask
from dpkd.priors.base import ImageViews, PriorConfig, grid_size
from dpkd.priors.catalogue.kernels import cell_means
from dpkd.priors.codecs import LABELS, Codec, JpegCodec, Map


class Superpixel(PriorConfig):
    """Region labels 0, 1, ..., one channel of int32, a cell every `stride` pixels.

    F-DBSCAN superpixels of the Lab image (Loke et al. 2021, "Accelerated superpixel image segmentation with a
    parallelized DBSCAN algorithm"), read at the centre of each cell. Labels of different images are unrelated. An image
    too small for two regions is one region.
    """

    kind: Literal["superpixel"] = "superpixel"
    region_px: int = Field(16, ge=2)
    """Mean side of a region in pixels: 196 regions at 224 x 224, 28 at 84 x 84."""
    stride: int = Field(4, ge=1)

    channels: ClassVar[int] = 1
    nearest: ClassVar[bool] = True
    codec: ClassVar[Codec] = LABELS

    def map(self, image: ImageViews) -> Map:
        height, width = image.size
        num_regions = round(height * width / self.region_px**2)
        label_HW = np.zeros((height, width), np.int32)
        if num_regions >= 2 and min(height, width) >= 8:  # without a cluster, ScanSegment reads outside its buffers
            segment = cv2.ximgproc.createScanSegment(width, height, num_regions, 1, True)
            segment.iterate(cv2.cvtColor(image.rgb_HWC, cv2.COLOR_RGB2Lab))  # blurs the input in place
            label_HW = np.asarray(segment.getLabels(), np.int32)
        num_rows, num_columns = grid_size(image, self.stride)
        rows = ((np.arange(num_rows) + 0.5) * height / num_rows).astype(np.intp)  # the middle of each cell
        columns = ((np.arange(num_columns) + 0.5) * width / num_columns).astype(np.intp)
        _, compact = np.unique(label_HW[np.ix_(rows, columns)], return_inverse=True)
        return compact.reshape(num_rows, num_columns, 1).astype(np.int32)


class Expert(PriorConfig):
    """The mask, or the expert map named `of`, on a grid: one channel in [0, 1], the map `expert-<of>`.

    A cell has the mean of its pixels. A sample without the map has one cell of NaN: the map is unknown, and training
    and pooling by the map skip that sample.
    """

    kind: Literal["expert"] = "expert"
    of: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    """`mask` is `<key>.mask.png`; any other name N is `<key>.expert-N.png`."""
    values: Literal["figure", "amount"] = "figure"
    """`figure` maps every value above 0 to 1; `amount` divides the values by the largest possible value."""
    stride: int = Field(4, ge=1)

    channels: ClassVar[int] = 1
    codec: ClassVar[Codec] = JpegCodec()

    @property
    def name(self) -> str:
        return f"expert-{self.of}"

    def map(self, image: ImageViews) -> Map:
        """The expert's map, float32 HW1; raises ValueError if the file is not a grey image of the same size."""
        if self.of not in image.given:
            return np.full((1, 1, 1), np.nan, np.float32)
        try:
            mask_HW = decode_mask(image.given[self.of])
        except BrokenImage as error:
            raise ValueError(f"the expert map {self.of!r} cannot be used: {error}") from error
        if mask_HW.shape != image.size:
            raise ValueError(f"the expert map {self.of!r} has the shape {mask_HW.shape}, and the image {image.size}")
        if self.values == "figure":
            amount_HW = (mask_HW > 0).astype(np.float32)
        else:
            amount_HW = mask_HW.astype(np.float32) * np.float32(1 / np.iinfo(mask_HW.dtype).max)
        return cell_means(amount_HW, grid_size(image, self.stride))
