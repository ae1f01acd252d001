"""A picture of samples with all their maps: a row a sample, a column a map, each map drawn in the image's own shape.

How a map is drawn follows from what it is: one amount as heat, region labels as borders on the image, two or three
channels as colours, and more channels by their three principal components as red, green and blue, so that cells of
like values have like colours. Axes: H W height and width, C channels, N cells.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Drawing = NDArray[np.uint8]
Map = NDArray[np.float32 | np.int32]

CELL = 144
"""Longer side of a drawn image or map, in pixels."""
GAP = 4
TITLE_HEIGHT = 20
MISSING = 230
"""Grey of a map that nobody gave."""


@dataclass(frozen=True)
class ShownSample:
    """One row of the sheet: an RGB image uint8 HWC, and its maps HWC by name; int32 maps hold region labels."""

    image_HWC: Drawing
    maps: Mapping[str, Map]


def sheet(samples: Sequence[ShownSample]) -> Drawing:
    """The picture as RGB uint8 HWC, titled with the names of the maps, which are the same for all samples."""
    names = ["image", *samples[0].maps]
    rows = [[_padded(cell) for cell in _cells(sample)] for sample in samples]
    titles = np.concatenate([_title(name) for name in names], axis=1)
    return np.concatenate([titles, *(np.concatenate(row, axis=1) for row in rows)])


def draw_map(map_HWC: Map, *, image_HWC: Drawing) -> Drawing:
    """The map as RGB uint8 in the shape of `image_HWC`."""
    height, width = image_HWC.shape[:2]
    if np.issubdtype(map_HWC.dtype, np.integer):
        return _borders(map_HWC[:, :, 0], image_HWC) if map_HWC.min() >= 0 else np.full_like(image_HWC, MISSING)
    if np.isnan(map_HWC).any():
        return np.full_like(image_HWC, MISSING)
    channels = map_HWC.shape[2]
    small = _heat(map_HWC[:, :, 0]) if channels == 1 else _colours(map_HWC)
    return _bytes(cv2.resize(small, (width, height), interpolation=cv2.INTER_NEAREST))


def _cells(sample: ShownSample) -> list[Drawing]:
    height, width = sample.image_HWC.shape[:2]
    scale = CELL / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    image_HWC = _bytes(cv2.resize(sample.image_HWC, size, interpolation=method))
    return [image_HWC, *(draw_map(each, image_HWC=image_HWC) for each in sample.maps.values())]


def _heat(map_HW: NDArray[Any]) -> Drawing:
    """Dark for 0 to bright for 1."""
    level_HW = np.rint(np.clip(map_HW, 0, 1) * 255).astype(np.uint8)
    return _bytes(cv2.cvtColor(cv2.applyColorMap(level_HW, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB))


def _colours(map_HWC: Map) -> Drawing:
    """Two or three channels as red, green and blue; more by their principal components, stretched over the map."""
    height, width, channels = map_HWC.shape
    if channels <= 3:
        shown_HWC = np.pad(map_HWC, ((0, 0), (0, 0), (0, 3 - channels)))
        return _bytes(np.rint(np.clip(shown_HWC, 0, 1) * 255))
    centred_NC = map_HWC.reshape(-1, channels) - map_HWC.reshape(-1, channels).mean(0)
    _, _, axis_CC = np.linalg.svd(centred_NC, full_matrices=False)
    component_N3 = np.zeros((len(centred_NC), 3), np.float32)
    axis_3C = axis_CC[:3] * np.where(axis_CC[:3].sum(1, keepdims=True) < 0, -1, 1)  # a sign of its own is arbitrary
    component_N3[:, : len(axis_3C)] = centred_NC @ axis_3C.T
    low_3, high_3 = np.percentile(component_N3, (2, 98), axis=0)
    spread = max(float((high_3 - low_3).max()), 1e-6)  # one for all: the first component shows as the strongest
    middle_3 = (low_3 + high_3) / 2
    return _bytes(np.clip((component_N3 - middle_3) / spread + 0.5, 0, 1).reshape(height, width, 3) * 255)


def _borders(label_HW: NDArray[Any], image_HWC: Drawing) -> Drawing:
    """The image with the borders between regions drawn on it."""
    height, width = image_HWC.shape[:2]
    label_HW = cv2.resize(label_HW.astype(np.float32), (width, height), interpolation=cv2.INTER_NEAREST)
    border_HW = np.zeros((height, width), bool)
    border_HW[1:] |= label_HW[1:] != label_HW[:-1]
    border_HW[:, 1:] |= label_HW[:, 1:] != label_HW[:, :-1]
    drawn_HWC = image_HWC.copy()
    drawn_HWC[border_HW] = (255, 220, 0)
    return drawn_HWC


def _padded(cell_HWC: Drawing) -> Drawing:
    """The cell in the middle of a white square with a gap."""
    height, width = cell_HWC.shape[:2]
    square_HWC = np.full((CELL + GAP, CELL + GAP, 3), 255, np.uint8)
    top, left = (CELL - height) // 2, (CELL - width) // 2
    square_HWC[top : top + height, left : left + width] = cell_HWC
    return square_HWC


def _title(text: str) -> Drawing:
    title_HWC = np.full((TITLE_HEIGHT, CELL + GAP, 3), 255, np.uint8)
    cv2.putText(title_HWC, text, (1, TITLE_HEIGHT - 6), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (40, 40, 40), 1, cv2.LINE_AA)
    return title_HWC


def _bytes(picture: NDArray[Any]) -> Drawing:
    return np.asarray(picture, np.uint8)
