"""Regions: superpixels, and an expert's masks and maps."""

from functools import lru_cache
from typing import ClassVar, Literal

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import Field

from dpkd.data.image_headers import BrokenImage
from dpkd.data.images import decode_mask
from dpkd.data.masks import classes_of
from dpkd.data.settings import MaskFormat
from dpkd.priors.base import ImageViews, PriorConfig, grid_size, lab
from dpkd.priors.catalogue.kernels import Image, Kernel, cell_means
from dpkd.priors.codecs import BYTES, LABELS, Codec, JpegCodec, Map

Indices = npt.NDArray[np.int64]


class Superpixel(PriorConfig):
    """Region labels 0, 1, ..., one channel of int32, a cell every `stride` pixels; each region is connected.

    Cells are merged by their mean Lab colours to one region per `region_px`² pixels: Borůvka's rounds on the grid of
    cells, as in the superpixel hierarchy of Wei et al. 2018, with the loss of Ward 1963. Labels of different images are
    unrelated.
    """

    kind: Literal["superpixel"] = "superpixel"
    region_px: int = Field(16, ge=2)
    """Mean side of a region in pixels: 196 regions at 224 x 224, 28 at 84 x 84."""
    stride: int = Field(4, ge=1)

    version: ClassVar[int] = 2
    channels: ClassVar[int] = 1
    nearest: ClassVar[bool] = True
    codec: ClassVar[Codec] = LABELS

    def map(self, image: ImageViews) -> Map:
        height, width = grid_size(image, self.stride)
        cell_HWC = cv2.resize(image.rgb_HWC, (width, height), interpolation=cv2.INTER_AREA)
        colour_NC = lab(np.asarray(cell_HWC, np.uint8)).reshape(-1, 3)
        num_regions = max(1, round(image.size[0] * image.size[1] / self.region_px**2))
        label_N = merged_regions(colour_NC, *neighbours(height, width), num_regions)
        return np.asarray(label_N, np.int32).reshape(height, width, 1)


@lru_cache(maxsize=16)
def neighbours(height: int, width: int) -> tuple[Indices, Indices]:
    """The first and the second cell of each pair of neighbours on a grid.

    The order halves the grid again and again, so that cells of one colour merge to squares.
    """
    cell_HW = np.arange(height * width).reshape(height, width)
    first_P = np.concatenate([cell_HW[:, :-1].ravel(), cell_HW[:-1].ravel()])
    second_P = np.concatenate([cell_HW[:, 1:].ravel(), cell_HW[1:].ravel()])
    beside_P = np.arange(len(first_P)) < height * (width - 1)
    place_P = np.where(beside_P, second_P % width, second_P // width)
    order_P = np.lexsort([~beside_P, place_P & -place_P])  # by the largest power of two that divides the place
    return first_P[order_P], second_P[order_P]


def merged_regions(colour_NC: Image, first_P: Indices, second_P: Indices, num_regions: int) -> Indices:
    """Labels of N cells, merged to `num_regions` regions; cells first_P[p] and second_P[p] are neighbours.

    In each round every region merges with the neighbour of the least loss, until `num_regions` are left: the regions
    of the least losses first. The loss of two regions of n and m cells is the increase of the sum of squared
    deviations, n m / (n + m) times the squared distance of their mean colours, here plus 1: smaller regions first.
    """
    label_N, total_RC, size_R = np.arange(len(colour_NC)), colour_NC, np.ones(len(colour_NC), np.float32)
    while len(size_R) > num_regions:
        least_R, nearest_R = _nearest(total_RC / size_R[:, None], size_R, first_P, second_P)
        merged_R = _merged(np.argsort(least_R), nearest_R, num_regions)
        *totals, size_R = (np.bincount(merged_R, part_R).astype(np.float32) for part_R in (*total_RC.T, size_R))
        total_RC, label_N = np.stack(totals, axis=1), merged_R[label_N]
        first_P, second_P = merged_R[first_P], merged_R[second_P]
        apart_P = first_P != second_P
        first_P, second_P = first_P[apart_P], second_P[apart_P]
    return label_N


@Kernel
def _nearest(mean_RC, size_R, first_P, second_P):  # type: ignore[no-untyped-def]
    """The least loss of each region, and the neighbour that it merges with."""
    least_R, nearest_R = np.full(len(size_R), np.inf, np.float32), np.zeros(len(size_R), np.int64)
    for p in range(len(first_P)):
        i, j = first_P[p], second_P[p]
        d0, d1, d2 = mean_RC[i, 0] - mean_RC[j, 0], mean_RC[i, 1] - mean_RC[j, 1], mean_RC[i, 2] - mean_RC[j, 2]
        loss = (d0 * d0 + d1 * d1 + d2 * d2 + np.float32(1)) * (size_R[i] * size_R[j] / (size_R[i] + size_R[j]))
        if loss < least_R[i]:
            least_R[i], nearest_R[i] = loss, j
        if loss < least_R[j]:
            least_R[j], nearest_R[j] = loss, i
    return least_R, nearest_R


@Kernel
def _merged(order_R, nearest_R, num_regions):  # type: ignore[no-untyped-def]
    """New labels of the regions, merged with the nearest ones in this order until `num_regions` are left."""
    root_R, remaining = np.arange(len(order_R)), len(order_R)  # a root is the smallest number of its region
    for r in order_R:
        i, j = r, nearest_R[r]
        while root_R[i] != i:
            i = root_R[i]
        while root_R[j] != j:
            j = root_R[j]
        if i != j and remaining > num_regions:
            root_R[max(i, j)] = min(i, j)
            remaining -= 1
    count = 0
    for r in range(len(root_R)):
        if root_R[r] == r:
            root_R[r] = count
            count += 1
        else:
            root_R[r] = root_R[root_R[r]]
    return root_R


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
        mask_HW = given_mask(image, self.of)
        if mask_HW is None:
            return np.full((1, 1, 1), np.nan, np.float32)
        if self.values == "figure":
            amount_HW = (mask_HW > 0).astype(np.float32)
        else:
            amount_HW = mask_HW.astype(np.float32) * np.float32(1 / np.iinfo(mask_HW.dtype).max)
        return cell_means(amount_HW, grid_size(image, self.stride))


def given_mask(image: ImageViews, name: str) -> npt.NDArray[np.uint8 | np.uint16] | None:
    """The file of a sample's expert map, HW; None without one. Raises ValueError if it does not fit the image."""
    if name not in image.given:
        return None
    try:
        mask_HW = decode_mask(image.given[name])
    except BrokenImage as error:
        raise ValueError(f"the expert map {name!r} cannot be used: {error}") from error
    if mask_HW.shape != image.size:
        raise ValueError(f"the expert map {name!r} has the shape {mask_HW.shape}, and the image {image.size}")
    return mask_HW


class Mask(PriorConfig):
    """The masks of `data.masks` for training: the share of each class in each cell, one channel a class.

    A run with `data.masks` adds it by itself. Pixels without a class count in no channel. A sample without a mask, or
    with one that cannot be used, has one cell of NaN.
    """

    kind: Literal["mask"] = "mask"
    format: MaskFormat = MaskFormat(kind="figure_ground")

    of: ClassVar[str] = "mask"
    codec: ClassVar[Codec] = BYTES
    unknown: ClassVar[float] = float("nan")

    @classmethod
    def of_format(cls, masks: MaskFormat) -> "Mask":
        """The map of masks of this format, whichever of them are visible."""
        return cls(format=MaskFormat(**masks.model_dump(include=set(MaskFormat.model_fields))))

    @property
    def channels(self) -> int:
        """The number of classes."""
        return len(self.format.names)

    def map(self, image: ImageViews) -> Map:
        """The shares, float32 HWK; raises ValueError for values without a class, and a mask without a class."""
        mask_HW = given_mask(image, self.of)
        if mask_HW is None:
            return np.full((1, 1, self.channels), np.nan, np.float32)
        class_HW = classes_of(mask_HW, self.format)
        if class_HW.max() < 0:
            raise ValueError("the mask is empty: no pixel has a class")
        share_HWK = (class_HW[:, :, None] == np.arange(self.channels)).astype(np.float32)
        return cell_means(share_HWK, grid_size(image, self.format.stride))
