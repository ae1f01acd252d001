"""Regions: superpixels, and the masks and maps that an expert drew."""

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
            segment.iterate(cv2.cvtColor(image.rgb_HWC, cv2.COLOR_RGB2Lab))  # it blurs its input in place
            label_HW = np.asarray(segment.getLabels(), np.int32)
        num_rows, num_columns = grid_size(image, self.stride)
        rows = ((np.arange(num_rows) + 0.5) * height / num_rows).astype(np.intp)  # the middle of each cell
        columns = ((np.arange(num_columns) + 0.5) * width / num_columns).astype(np.intp)
        _, compact = np.unique(label_HW[np.ix_(rows, columns)], return_inverse=True)
        return compact.reshape(num_rows, num_columns, 1).astype(np.int32)


class Expert(PriorConfig):
    """The mask, or the expert map `of` that name, on a grid: one channel in [0, 1], the map `expert-<of>`.

    A cell holds the mean of its pixels. A sample that came without it has a single cell of NaN: it is not known, and
    whatever is trained or pooled by the map leaves that sample out.
    """

    kind: Literal["expert"] = "expert"
    of: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    """`mask` is `<key>.mask.png`; any other name N is `<key>.expert-N.png`."""
    values: Literal["figure", "amount"] = "figure"
    """`figure` takes every value above 0 as 1; `amount` takes the values as shares of the largest possible one."""
    stride: int = Field(4, ge=1)

    channels: ClassVar[int] = 1
    codec: ClassVar[Codec] = JpegCodec()

    @property
    def name(self) -> str:
        return f"expert-{self.of}"

    def map(self, image: ImageViews) -> Map:
        """The expert's map, float32 HW1; raises ValueError for a file that is no grey image of the image's size."""
        if self.of not in image.given:
            return np.full((1, 1, 1), np.nan, np.float32)
        try:
            drawn_HW = decode_mask(image.given[self.of])
        except BrokenImage as error:
            raise ValueError(f"the expert map {self.of!r} cannot be used: {error}") from error
        if drawn_HW.shape != image.size:
            raise ValueError(f"the expert map {self.of!r} has the shape {drawn_HW.shape}, the image {image.size}")
        if self.values == "figure":
            amount_HW = (drawn_HW > 0).astype(np.float32)
        else:
            amount_HW = drawn_HW.astype(np.float32) * np.float32(1 / np.iinfo(drawn_HW.dtype).max)
        return cell_means(amount_HW, grid_size(image, self.stride))
