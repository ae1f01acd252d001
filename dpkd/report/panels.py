"""Pictures of what a network sees: image, prior maps, its predictions of them, and its attention, side by side.

Axes: B image, C channels, H W height and width. One row a sample, one column a map, a title over each column.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]

CELL = 112
"""Side of a cell in pixels."""
GAP = 4
TITLE_HEIGHT = 22
LABEL_MAPS = frozenset({"superpixel"})
"""Maps whose values are names of regions, not amounts."""


def panel(
    image_BCHW: Picture,
    *,
    priors: Mapping[str, NDArray[np.floating]],
    predictions: Mapping[str, NDArray[np.floating]],
    attention_B1HW: NDArray[np.floating] | None = None,
    num_rows: int = 6,
) -> Picture:
    """The grid as RGB uint8 HWC, with rows for the first images.

    Maps may have any size; the prediction of a prior stands at its right.
    """
    count = min(num_rows, len(image_BCHW))
    image_BHWC = np.moveaxis(np.asarray(image_BCHW[:count], np.uint8), 1, -1)
    columns = {"image": [_fit(image_HWC, cv2.INTER_AREA) for image_HWC in image_BHWC]}
    for name in [*priors, *(name for name in predictions if name not in priors)]:
        if name in priors:
            columns[name] = _column(priors[name][:count], name=name, image_BHWC=image_BHWC)
        if name in predictions:
            columns[f"{name} predicted"] = _column(predictions[name][:count], name="", image_BHWC=image_BHWC)
    if attention_B1HW is not None:
        columns["attention"] = [
            _overlay(map_1HW[0], image_HWC)
            for map_1HW, image_HWC in zip(attention_B1HW[:count], image_BHWC, strict=True)
        ]
    return np.concatenate([_titled(title, cells) for title, cells in columns.items()], axis=1)


def _column(map_BCHW: NDArray[np.floating], *, name: str, image_BHWC: Picture) -> list[Picture]:
    if name in LABEL_MAPS:
        return [_regions(map_CHW[0], image_HWC) for map_CHW, image_HWC in zip(map_BCHW, image_BHWC, strict=True)]
    draw = _heat if map_BCHW.shape[1] == 1 else _orientations
    return [_fit(draw(map_CHW), cv2.INTER_NEAREST) for map_CHW in map_BCHW]


def _heat(map_1HW: NDArray[np.floating]) -> Picture:
    """One amount a place, dark to bright between the map's least and greatest."""
    return _coloured(_stretched(map_1HW[0]))


def _orientations(map_CHW: NDArray[np.floating]) -> Picture:
    """A histogram a place: hue is the mean direction of its bins around the circle, brightness its greatest bin."""
    angle_C = 2 * np.pi * np.arange(len(map_CHW)) / len(map_CHW)
    amount_CHW = _stretched(map_CHW) / 255.0
    direction_HW = np.angle(np.tensordot(np.exp(1j * angle_C), amount_CHW, axes=1))
    hue_HW = (direction_HW % (2 * np.pi)) / (2 * np.pi) * 180
    hsv_HWC = np.stack([hue_HW, np.full_like(hue_HW, 200), 255 * amount_CHW.max(0)], axis=-1)
    return np.asarray(cv2.cvtColor(np.clip(hsv_HWC, 0, 255).astype(np.uint8), cv2.COLOR_HSV2RGB), np.uint8)


def _regions(label_HW: NDArray[np.floating], image_HWC: Picture) -> Picture:
    """The image with the borders between regions drawn on it."""
    region_HW = cv2.resize(np.asarray(label_HW, np.float32), (CELL, CELL), interpolation=cv2.INTER_NEAREST)
    border_HW = np.zeros((CELL, CELL), bool)
    border_HW[1:] |= region_HW[1:] != region_HW[:-1]
    border_HW[:, 1:] |= region_HW[:, 1:] != region_HW[:, :-1]
    picture = _fit(image_HWC, cv2.INTER_AREA)
    picture[border_HW] = (255, 220, 0)
    return picture


def _overlay(map_HW: NDArray[np.floating], image_HWC: Picture) -> Picture:
    """The map as heat over the greyed image."""
    heat = _fit(_coloured(_stretched(map_HW)), cv2.INTER_CUBIC)
    grey = cv2.cvtColor(_fit(image_HWC, cv2.INTER_AREA), cv2.COLOR_RGB2GRAY)
    return np.asarray(cv2.addWeighted(heat, 0.6, cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB), 0.4, 0), np.uint8)


def _stretched(values: NDArray[np.floating]) -> Picture:
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
    head: Any = np.full((TITLE_HEIGHT, CELL + GAP, 3), 255, np.uint8)
    scale = min(0.45, 0.45 * CELL / cv2.getTextSize(title, cv2.FONT_HERSHEY_SIMPLEX, 0.45, 1)[0][0])
    cv2.putText(head, title, (1, 15), cv2.FONT_HERSHEY_SIMPLEX, scale, (0, 0, 0), 1, cv2.LINE_AA)
    framed = [np.pad(cell, ((0, GAP), (0, GAP), (0, 0)), constant_values=255) for cell in cells]
    return np.concatenate([head, *framed])
