"""What an expert drew: masks and maps that came with the samples."""

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from dpkd.config import Config
from dpkd.data.image_headers import BrokenImage
from dpkd.data.images import decode_mask
from dpkd.priors.base import ImageViews, PriorDefaults, grid_size
from dpkd.priors.catalogue.kernels import cell_means
from dpkd.priors.codecs import Codec, JpegCodec, Map


class Expert(PriorDefaults, Config):
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
        """Names the map in a prior set."""
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
