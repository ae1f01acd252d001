"""Random views: a resized crop, a flip, a colour change and another ground, drawn by (seed, epoch, sample) alone.

Prior maps follow the crop and the flip of their image. Their grids are coarser (21 x 21 for 84 x 84), so a crop starts
and ends inside a cell. Maps are resampled with a triangle filter over the exact crop, as Pillow does for
`resize(box=...)`; labels use the nearest cell. Axes: B images, V views of each, H height, W width (h and w of a map), C
channels. Views are written channel after channel (CHW), as batches hold them; the functions return them as HWC.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from dpkd.data.settings import AugmentSettings, BackgroundSettings
from dpkd.rng import Purpose, uniform

Image = NDArray[np.uint8]
Map = NDArray[Any]

GREY = (0.299, 0.587, 0.114)
"""Luma weights of RGB (ITU-R BT.601)."""
_MAX_STEP = 1.5
"""Distance of the samples of an image in pixels; at 2, details of images alias more than with a mean over the area."""
_NUM_CROPS = 10
"""Crops tried before the largest crop of the nearest allowed ratio (Szegedy et al. 2015, as in torchvision)."""
_NUM_DRAWS = 2 * _NUM_CROPS + 6
"""Random numbers for one view."""
CONTRAST = 1.3
"""Factor of the map: a figure whose saliency is a bit below 1 is kept whole."""
LEAST_FIGURE = 0.03
"""Mean share of figure below which an image keeps its ground: the map has found nothing."""


@dataclass(frozen=True)
class Crop:
    """One view of an image: a box in pixels, a flip, and colour factors (1: no change).

    `by_area` shrinks by means over areas: slower, and nearer to the preprocessing that an exported student has.
    """

    image_height: int
    image_width: int
    top: int
    left: int
    height: int
    width: int
    flip: bool = False
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    by_area: bool = False


def random_views(
    settings: Sequence[AugmentSettings], image_size: tuple[int, int], *, seed: int, epoch: int, index: int
) -> list[Crop]:
    """The views of sample `index` in `epoch`, one for each settings; `image_size` is (height, width) in pixels.

    The draws of a view depend on its position among the views, so later views do not change earlier ones.
    """
    all_draws = uniform(_NUM_DRAWS * len(settings), seed=seed, purpose=Purpose.VIEWS, place=(epoch, index))
    views = []
    for augment, draws in zip(settings, all_draws.reshape(-1, _NUM_DRAWS).tolist(), strict=True):
        height, width = _crop_size(augment, image_size, draws[: 2 * _NUM_CROPS])
        at_top, at_left, flip, brightness, contrast, saturation = draws[2 * _NUM_CROPS :]
        view = Crop(
            *image_size,
            top=int(at_top * (image_size[0] - height + 1)),
            left=int(at_left * (image_size[1] - width + 1)),
            height=height,
            width=width,
            flip=flip < augment.flip,
            brightness=_factor(augment.brightness, brightness),
            contrast=_factor(augment.contrast, contrast),
            saturation=_factor(augment.saturation, saturation),
        )
        views.append(view)
    return views


def centre_view(image_size: tuple[int, int]) -> Crop:
    """The view for evaluation: the largest centred square of an image of (height, width) pixels, colours unchanged."""
    height, width = image_size
    side = min(height, width)
    return Crop(
        height, width, top=(height - side) // 2, left=(width - side) // 2, height=side, width=side, by_area=True
    )


def apply_image(view: Crop, image_HWC: Image, *, size: int, out_CHW: Image | None = None) -> Image:
    """The view of an RGB image at `size` x `size`, uint8, written to `out_CHW` if given.

    Bilinear; if the view shrinks, each pixel is the mean of bilinear samples at most `_MAX_STEP` pixels apart, or, with
    `by_area`, the mean over its area.
    """
    crop: Any = image_HWC[view.top : view.top + view.height, view.left : view.left + view.width]
    if view.by_area and min(view.height, view.width) > size:
        crop = cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA)
    elif crop.shape[:2] != (size, size):
        num_y, num_x = (max(1, math.ceil(length / (size * _MAX_STEP))) for length in (view.height, view.width))
        crop = cv2.resize(crop, (num_x * size, num_y * size), interpolation=cv2.INTER_LINEAR)
        if (num_y, num_x) != (1, 1):
            crop = cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA)
    if (view.brightness, view.contrast, view.saturation) != (1.0, 1.0, 1.0):
        crop = cv2.transform(crop, _colour_matrix(view, mean_RGB=cv2.mean(crop)[:3]))
    out_CHW = np.empty((3, size, size), np.uint8) if out_CHW is None else out_CHW
    cv2.split(crop, list(out_CHW))
    if view.flip:
        for channel_HW in out_CHW:
            cv2.flip(channel_HW, 1, dst=channel_HW)
    return out_CHW.transpose(1, 2, 0)


def apply_map(
    view: Crop,
    map_HWC: Map,
    *,
    size: int,
    nearest: bool,
    flip: Callable[[Map], Map],
    out_CHW: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """The same view of a map of the whole image, float32 at `size` x `size`, written to `out_CHW` if given.

    `nearest` uses the cell at each pixel centre, for labels. `flip` returns the map of the mirrored image.
    """
    left = view.left
    if view.flip:
        map_HWC, left = flip(map_HWC), view.image_width - view.width - view.left
    height, width, channels = map_HWC.shape
    y = (view.top * (height / view.image_height), view.height * (height / view.image_height), height, size)
    x = (left * (width / view.image_width), view.width * (width / view.image_width), width, size)
    map_CHW = map_HWC.transpose(2, 0, 1)
    out_CHW = np.empty((channels, size, size), np.float32) if out_CHW is None else out_CHW
    if nearest:
        out_CHW[:] = map_CHW[:, _nearest_cells(*y)][:, :, _nearest_cells(*x)]
    else:
        (rows, weight_yH), (columns, weight_xW) = _triangle_weights(*y), _triangle_weights(*x)
        part_CHW = np.ascontiguousarray(map_CHW[:, rows, columns], np.float32)
        np.matmul((weight_yH @ part_CHW).reshape(channels * size, -1), weight_xW.T, out=out_CHW.reshape(-1, size))
    return out_CHW.transpose(1, 2, 0)


def replace_backgrounds(
    image_BCHW: NDArray[np.uint8],
    map_B1hw: NDArray[np.float32],
    *,
    settings: BackgroundSettings,
    seed: int,
    index_B: NDArray[np.int64],
    epoch_B: NDArray[np.int64],
) -> NDArray[np.uint8]:
    """The images [V·B], in which a share has the ground of the previous image of its view: `a · x + (1 - a) · other`.

    The figure keeps its label, so a network that learns from such images cannot read the label off the ground: an idea
    of copy-paste augmentation (Dwibedi et al. 2017) with a map that needs no annotation. `a = min(1, 1.3 · S)` with S
    the map of figure and ground. Chosen by (seed, epoch, sample), the same in all V views; the other image
    depends on the cut of the batch. An image without figure, or with an unknown map (NaN), stays as it is.
    """
    size = len(index_B)
    chosen_B = np.array(
        [
            uniform(1, seed=seed, purpose=Purpose.BACKGROUNDS, place=place)[0] < settings.share
            for place in zip(epoch_B.tolist(), index_B.tolist(), strict=True)
        ]
    )
    result_BCHW = image_BCHW.copy()
    for row, image_CHW in enumerate(image_BCHW):
        view, sample = divmod(row, size)
        source = view * size + (sample - 1) % size if settings.control == "shuffle" else row
        figure_HW = np.minimum(1, CONTRAST * cv2.resize(map_B1hw[source, 0], image_CHW.shape[:0:-1]))
        if chosen_B[sample] and figure_HW.mean() >= LEAST_FIGURE:  # false for NaN
            other_CHW = image_BCHW[view * size + (sample - 1) % size]
            blend_CHW = figure_HW * image_CHW + (1 - figure_HW) * other_CHW
            result_BCHW[row] = np.rint(blend_CHW)
    return result_BCHW


def normalise(image_BCHW: torch.Tensor, *, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Images as float32 with each channel shifted by `mean` and divided by `std` (RGB in 0 … 1); the input is uint8."""
    assert image_BCHW.dtype == torch.uint8, "images are normalised once, from bytes"
    shift_C11, scale_C11 = _shift_and_scale(tuple(mean), tuple(std), image_BCHW.device)
    return image_BCHW.float().sub_(shift_C11).mul_(scale_C11)


@lru_cache(16)
def _shift_and_scale(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """C11 each, kept on the device: a copy at every step would wait for it."""
    scale_C11 = 1 / (255 * torch.tensor(std, dtype=torch.float32, device=device)[:, None, None])
    return torch.tensor(mean, dtype=torch.float32, device=device)[:, None, None] * 255, scale_C11


def _crop_size(settings: AugmentSettings, image_size: tuple[int, int], draws: list[float]) -> tuple[int, int]:
    """Height and width of the first crop that fits into the image."""
    height, width = image_size
    low, high = settings.crop_scale
    narrow, wide = (math.log(ratio) for ratio in settings.crop_ratio)
    for share, slant in zip(draws[::2], draws[1::2], strict=True):
        area = (low + (high - low) * share) * height * width
        ratio = math.exp(narrow + (wide - narrow) * slant)
        crop_height, crop_width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < crop_height <= height and 0 < crop_width <= width:
            return crop_height, crop_width
    ratio = min(max(width / height, settings.crop_ratio[0]), settings.crop_ratio[1])
    return min(height, max(1, round(width / ratio))), min(width, max(1, round(height * ratio)))


def _factor(strength: float, draw: float) -> float:
    low, high = max(0.0, 1 - strength), 1 + strength
    return low + (high - low) * draw


def _colour_matrix(view: Crop, *, mean_RGB: Sequence[float]) -> NDArray[np.float64]:
    """The 3 x 4 matrix that scales brightness, contrast about the mean grey, and saturation about each pixel's grey.

    The three definitions are torchvision's, in a fixed order. One matrix clips the values once, at the end.
    """
    gain, own = view.brightness * view.contrast, view.brightness * view.contrast * view.saturation
    shift = (1 - view.contrast) * view.brightness * float(np.dot(GREY, mean_RGB))
    red, green, blue = (gain * (1 - view.saturation) * weight for weight in GREY)
    return np.array(((own + red, green, blue, shift), (red, own + green, blue, shift), (red, green, own + blue, shift)))


@lru_cache(64)
def _triangle_weights(start: float, length: float, num_cells: int, size: int) -> tuple[slice, NDArray[np.float32]]:
    """The cells of a view, and their weights [size, cells] in each pixel: bilinear, a wider triangle if it shrinks."""
    scale = length / size
    reach = max(scale, 1.0)
    low, high = start + scale / 2 - reach, start + length - scale / 2 + reach
    cells = slice(max(0, int(low)), min(num_cells, int(high) + 1))
    pixel_S = _centres(size) * (scale / reach) + (start - cells.start) / reach
    weight = np.subtract.outer(pixel_S, _centres(cells.stop - cells.start) * (1 / reach))
    np.abs(weight, out=weight)
    np.subtract(1, weight, out=weight)
    np.maximum(weight, 0, out=weight)
    weight /= weight.sum(1, keepdims=True)
    weight.setflags(write=False)
    return cells, weight


@lru_cache(64)
def _centres(count: int) -> NDArray[np.float32]:
    centres = np.arange(count, dtype=np.float32) + np.float32(0.5)
    centres.setflags(write=False)
    return centres


@lru_cache(64)
def _nearest_cells(start: float, length: float, num_cells: int, size: int) -> NDArray[np.int64]:
    """The cell [size] at each pixel centre."""
    cells = np.floor(start + (np.arange(size) + 0.5) * (length / size)).astype(np.int64).clip(0, num_cells - 1)
    cells.setflags(write=False)
    return cells
