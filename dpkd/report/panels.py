"""Pictures of what a network sees: image, prior maps, its predictions of them, and its attention, one below another.

A column is a sample, a row a map with its title above it. The picture is narrow, so that TensorBoard shows it legibly
in its cards, and the cards of several networks side by side.
Axes: B image, C channels, H W height and width.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
Map = NDArray[np.floating]

CELL = 112
"""Side of a cell in pixels."""
GAP = 4
TITLE_HEIGHT = 24
LABEL_MAPS = frozenset({"superpixel"})
"""Maps whose values are names of regions, not amounts."""


def panel(
    image_BCHW: Picture,
    *,
    priors: Mapping[str, Map],
    predictions: Mapping[str, Map],
    attention_B1HW: Map | None = None,
    num_columns: int = 4,
) -> Picture:
    """The grid as RGB uint8 HWC, with columns for the first images; maps may have any size.

    Where a prior is predicted, it is shown as it is, as the network is to predict it (on the patch grid, standardised
    by image and channel), and as predicted.
    """
    count = min(num_columns, len(image_BCHW))
    image_BHWC = np.moveaxis(np.asarray(image_BCHW[:count], np.uint8), 1, -1)
    rows = {"image": [_fit(image_HWC, cv2.INTER_AREA) for image_HWC in image_BHWC]}
    for name, prior_BCHW in priors.items():
        rows[name] = _row(prior_BCHW[:count], name=name, image_BHWC=image_BHWC)
    for name, predicted_BCHW in predictions.items():
        if name in priors:
            targets = [_target(prior_CHW, predicted_BCHW.shape[2:]) for prior_CHW in priors[name][:count]]
            rows[f"{name}: target"] = _row(np.stack(targets), name="", image_BHWC=image_BHWC)
        rows[f"{name}: predicted"] = _row(predicted_BCHW[:count], name="", image_BHWC=image_BHWC)
    if attention_B1HW is not None:
        rows["attention"] = [
            _overlay(map_1HW[0], image_HWC)
            for map_1HW, image_HWC in zip(attention_B1HW[:count], image_BHWC, strict=True)
        ]
    return np.concatenate([_titled(title, cells) for title, cells in rows.items()])


def _row(map_BCHW: Map, *, name: str, image_BHWC: Picture) -> list[Picture]:
    if name in LABEL_MAPS:
        return [_regions(map_CHW[0], image_HWC) for map_CHW, image_HWC in zip(map_BCHW, image_BHWC, strict=True)]
    draw = _heat if map_BCHW.shape[1] == 1 else _directions
    return [_fit(draw(map_CHW), cv2.INTER_NEAREST) for map_CHW in map_BCHW]


def _target(map_CHW: Map, size_HW: tuple[int, ...]) -> Map:
    """The map on a coarser grid, each channel with mean 0 and deviation 1."""
    height, width = size_HW
    full_CHW = np.asarray(map_CHW, np.float32)
    channels = [cv2.resize(full_HW, (width, height), interpolation=cv2.INTER_AREA) for full_HW in full_CHW]
    coarse_CHW = np.stack(channels)
    deviation_C11 = coarse_CHW.std((1, 2), keepdims=True)
    return np.asarray((coarse_CHW - coarse_CHW.mean((1, 2), keepdims=True)) / (deviation_C11 + 1e-6), np.float32)


def _heat(map_1HW: Map) -> Picture:
    """One amount a place, dark to bright between the map's least and greatest."""
    return _coloured(_stretched(map_1HW[0]))


def _directions(map_CHW: Map) -> Picture:
    """A histogram a place: hue is the mean direction of its bins around the circle, brightness its greatest bin.

    In a standardised map only the bins above their mean count.
    """
    angle_C = 2 * np.pi * np.arange(len(map_CHW)) / len(map_CHW)
    amount_CHW = np.clip(np.nan_to_num(np.asarray(map_CHW, np.float32)), 0, None)
    direction_HW = np.angle(np.tensordot(np.exp(1j * angle_C), amount_CHW, axes=1))
    hue_HW = (direction_HW % (2 * np.pi)) / (2 * np.pi) * 180
    strength_HW = amount_CHW.max(0) / max(float(amount_CHW.max()), 1e-6)
    hsv_HWC = np.stack([hue_HW, np.full_like(hue_HW, 200), 255 * strength_HW], axis=-1)
    return np.asarray(cv2.cvtColor(np.clip(hsv_HWC, 0, 255).astype(np.uint8), cv2.COLOR_HSV2RGB), np.uint8)


def _regions(label_HW: Map, image_HWC: Picture) -> Picture:
    """The image with the borders between regions drawn on it."""
    region_HW = cv2.resize(np.asarray(label_HW, np.float32), (CELL, CELL), interpolation=cv2.INTER_NEAREST)
    border_HW = np.zeros((CELL, CELL), bool)
    border_HW[1:] |= region_HW[1:] != region_HW[:-1]
    border_HW[:, 1:] |= region_HW[:, 1:] != region_HW[:, :-1]
    picture = _fit(image_HWC, cv2.INTER_AREA)
    picture[border_HW] = (255, 220, 0)
    return picture


def _overlay(map_HW: Map, image_HWC: Picture) -> Picture:
    """The map as heat over the greyed image."""
    heat = _fit(_coloured(_stretched(map_HW)), cv2.INTER_CUBIC)
    grey = cv2.cvtColor(_fit(image_HWC, cv2.INTER_AREA), cv2.COLOR_RGB2GRAY)
    return np.asarray(cv2.addWeighted(heat, 0.6, cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB), 0.4, 0), np.uint8)


def _stretched(values: Map) -> Picture:
    values = np.nan_to_num(np.asarray(values, np.float32))
    low, high = float(values.min()), float(values.max())
    return np.asarray(255 * (values - low) / max(high - low, 1e-6), np.uint8)


def _coloured(grey_HW: Picture) -> Picture:
    return np.asarray(cv2.cvtColor(cv2.applyColorMap(grey_HW, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB), np.uint8)


def _fit(picture: Picture, interpolation: int) -> Picture:
    """The picture at the size of a cell; enlarged without inventing detail where it is a photograph."""
    if interpolation == cv2.INTER_AREA and max(picture.shape[:2]) < CELL:
        interpolation = cv2.INTER_CUBIC
    return np.array(cv2.resize(picture, (CELL, CELL), interpolation=interpolation), np.uint8)


def _titled(title: str, cells: Iterable[Picture]) -> Picture:
    framed = [np.pad(cell, ((0, GAP), (0, GAP), (0, 0)), constant_values=255) for cell in cells]
    row = np.concatenate(framed, axis=1)
    head: Any = np.full((TITLE_HEIGHT, row.shape[1], 3), 255, np.uint8)
    cv2.putText(head, title, (1, TITLE_HEIGHT - 7), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (40, 40, 40), 1, cv2.LINE_AA)
    return np.concatenate([head, row])
