"""Pictures of images and their maps, for TensorBoard (`panel`) and for `dpkd inspect --picture` (`sheet`).

A map with one channel is drawn as heat, region labels as borders on the image, and two or three channels as colours.
More channels are drawn by their three principal components as red, green and blue, so that cells of similar values
have similar colours, in all maps that are drawn together.
Axes: B image, C channels, H W height and width, N cells.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
Map = NDArray[np.floating | np.integer]

CELL = 128
"""Longer side of a drawn image or map, in pixels."""
GAP = 4
TITLE_HEIGHT = 20
MISSING = 230
"""Grey of a map that is missing or not finite."""
BORDER = (255, 220, 0)
LABEL_MAPS = frozenset({"superpixel"})
"""Maps of a batch whose values are region labels, not amounts."""


def sheet(samples: Sequence[tuple[Picture, Mapping[str, Map]]]) -> Picture:
    """A picture with one row per sample and one column per map, as RGB uint8 HWC.

    A sample is an RGB image uint8 HWC, and its maps HWC by name; int32 maps hold region labels. All samples have maps
    of the same names.
    """
    images = [_fitted(image_HWC) for image_HWC, _ in samples]
    columns = {"image": images}
    for name in samples[0][1]:
        columns[name] = draw_maps([maps[name] for _, maps in samples], images=images)
    titles = np.concatenate([_title(name, width=CELL + GAP) for name in columns], axis=1)
    return np.concatenate([titles, *(_row(cells) for cells in zip(*columns.values(), strict=True))])


def contact_sheet(rows: Sequence[Sequence[tuple[str, Picture]]]) -> Picture:
    """A picture of rows of images with a title each, as RGB uint8 HWC; shorter rows end in white."""
    width = max(map(len, rows)) * (CELL + GAP)
    parts = []
    for row in rows:
        titles = [_title(title, width=CELL + GAP) for title, _ in row]
        row_HWC = np.concatenate([np.concatenate(titles, axis=1), _row(_fitted(image_HWC) for _, image_HWC in row)])
        parts.append(np.pad(row_HWC, ((0, 0), (0, width - row_HWC.shape[1]), (0, 0)), constant_values=255))
    return np.concatenate(parts)


def panel(
    image_BCHW: Picture,
    *,
    priors: Mapping[str, Map],
    predictions: Mapping[str, Map],
    attention_B1HW: Map | None = None,
    num_columns: int = 4,
) -> Picture:
    """A picture with one column per sample and one titled row per map, as RGB uint8 HWC.

    It shows the first `num_columns` images. A predicted prior has three rows: the prior, the target (on the patch grid,
    standardised per image and channel) and the prediction. The picture is narrow, so that TensorBoard shows several
    side by side.
    """
    count = min(num_columns, len(image_BCHW))
    images = [_fitted(image_HWC) for image_HWC in np.moveaxis(np.asarray(image_BCHW[:count], np.uint8), 1, -1)]
    rows = {"image": images}
    for name, prior_BCHW in priors.items():
        maps: list[Map] = [np.moveaxis(map_CHW, 0, -1) for map_CHW in prior_BCHW[:count]]
        shown = [np.asarray(map_HWC, np.int32) if name in LABEL_MAPS else _stretched(map_HWC) for map_HWC in maps]
        rows[name] = draw_maps(shown, images=images)
    for name, predicted_BCHW in predictions.items():
        targets = []  # the map on the patch grid, each channel with mean 0 and deviation 1
        for map_CHW in np.asarray(priors[name][:count], np.float32) if name in priors else ():
            size = predicted_BCHW.shape[:1:-1]
            coarse_CHW = np.stack([cv2.resize(plane_HW, size, interpolation=cv2.INTER_AREA) for plane_HW in map_CHW])
            mean_C11, deviation_C11 = coarse_CHW.mean((1, 2), keepdims=True), coarse_CHW.std((1, 2), keepdims=True)
            targets.append((coarse_CHW - mean_C11) / (deviation_C11 + 1e-6))
        maps = [_stretched(np.moveaxis(map_CHW, 0, -1)) for map_CHW in (*targets, *predicted_BCHW[:count])]
        drawn = draw_maps(maps, images=images * 2 if targets else images)  # together, so that colours are comparable
        if targets:
            rows[f"{name}: target"] = drawn[:count]
        rows[f"{name}: predicted"] = drawn[-count:]
    if attention_B1HW is not None:
        rows["attention"] = []
        for map_1HW, image_HWC in zip(attention_B1HW[:count], images, strict=True):  # heat over the greyed image
            small_HWC = _heat(np.nan_to_num(_stretched(map_1HW[0])))
            heat_HWC = cv2.resize(small_HWC, image_HWC.shape[1::-1], interpolation=cv2.INTER_CUBIC)
            grey_HWC = cv2.cvtColor(cv2.cvtColor(image_HWC, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
            rows["attention"].append(np.asarray(cv2.addWeighted(heat_HWC, 0.6, grey_HWC, 0.4, 0), np.uint8))
    width = count * (CELL + GAP)
    return np.concatenate([part for title, cells in rows.items() for part in (_title(title, width=width), _row(cells))])


def draw_maps(maps: Sequence[Map], *, images: Sequence[Picture]) -> list[Picture]:
    """Pictures of the maps HWC of one prior, RGB uint8, each in the shape of its image; amounts are in [0, 1]."""
    known = [map_HWC for map_HWC in maps if np.isfinite(map_HWC).all()]
    drawn = []
    for map_HWC, image_HWC in zip(maps, images, strict=True):
        size = image_HWC.shape[1::-1]
        are_labels = np.issubdtype(map_HWC.dtype, np.integer)
        if not np.isfinite(map_HWC).all() or (are_labels and map_HWC.min() < 0):
            drawn.append(np.full_like(image_HWC, MISSING))
        elif are_labels:  # the borders between regions on the image
            label_HW = cv2.resize(map_HWC[:, :, 0].astype(np.float32), size, interpolation=cv2.INTER_NEAREST)
            border_HW = np.zeros(label_HW.shape, bool)
            border_HW[1:] |= label_HW[1:] != label_HW[:-1]
            border_HW[:, 1:] |= label_HW[:, 1:] != label_HW[:, :-1]
            drawn.append(np.where(border_HW[:, :, None], BORDER, image_HWC).astype(np.uint8))
        else:
            small_HWC = _heat(map_HWC[:, :, 0]) if map_HWC.shape[2] == 1 else _colours(map_HWC, known)
            drawn.append(np.asarray(cv2.resize(small_HWC, size, interpolation=cv2.INTER_NEAREST), np.uint8))
    return drawn


def _stretched(map_HWC: Map) -> Map:
    """The map scaled to [0, 1]; a map of more than 3 channels is not scaled, because `_colours` does it."""
    values = np.asarray(map_HWC, np.float32)
    if values.ndim == 3 and values.shape[2] > 3:
        return values
    return (values - values.min()) / max(float(np.ptp(values)), 1e-6)


def _heat(map_HW: NDArray[Any]) -> Picture:
    """The picture of a map in [0, 1], from dark for 0 to bright for 1."""
    level_HW = np.rint(np.clip(map_HW, 0, 1) * 255).astype(np.uint8)
    return cv2.cvtColor(cv2.applyColorMap(level_HW, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)


def _colours(map_HWC: Map, shown: Sequence[Map]) -> Picture:
    """Two or three channels as red, green and blue; more by the principal components of all cells in `shown`."""
    channels = map_HWC.shape[2]
    if channels <= 3:
        shown_HWC = np.pad(map_HWC, ((0, 0), (0, 0), (0, 3 - channels)))
        return np.rint(np.clip(shown_HWC, 0, 1) * 255).astype(np.uint8)
    cell_NC = np.concatenate([shown_HWC.reshape(-1, channels) for shown_HWC in shown])
    mean_C = cell_NC.mean(0)
    _, _, axis_CC = np.linalg.svd(cell_NC - mean_C, full_matrices=False)
    axis_3C = axis_CC[:3] * np.where(
        axis_CC[:3].sum(1, keepdims=True) < 0, -1, 1
    )  # the sign of a component is arbitrary
    low_3, high_3 = np.percentile((cell_NC - mean_C) @ axis_3C.T, (2, 98), axis=0)
    spread = max(float((high_3 - low_3).max()), 1e-6)  # one scale: the first component stays the strongest
    component_HWC = ((map_HWC - mean_C) @ axis_3C.T - (low_3 + high_3) / 2) / spread + 0.5
    padded_HWC = np.pad(component_HWC, ((0, 0), (0, 0), (0, 3 - len(axis_3C))), constant_values=0.5)
    return (np.clip(padded_HWC, 0, 1) * 255).astype(np.uint8)


def _fitted(image_HWC: Picture) -> Picture:
    """The image, resized so that its longer side has `CELL` pixels."""
    height, width = image_HWC.shape[:2]
    scale = CELL / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(image_HWC, size, interpolation=interpolation), np.uint8)


def _row(cells: Iterable[Picture]) -> Picture:
    """The cells side by side, each in the middle of a white square with a gap."""
    squares = []
    for cell_HWC in cells:
        height, width = cell_HWC.shape[:2]
        top, left = (CELL - height) // 2, (CELL - width) // 2
        edges = (top, CELL + GAP - height - top, left, CELL + GAP - width - left)
        squares.append(cv2.copyMakeBorder(cell_HWC, *edges, cv2.BORDER_CONSTANT, value=(255, 255, 255)))
    return np.concatenate(squares, axis=1)


def _title(text: str, *, width: int) -> Picture:
    title_HWC = np.full((TITLE_HEIGHT, width, 3), 255, np.uint8)
    cv2.putText(title_HWC, text, (1, TITLE_HEIGHT - 6), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (40, 40, 40), 1, cv2.LINE_AA)
    return title_HWC
