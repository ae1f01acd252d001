"""Maps computed from stored maps when a sample is read, without storage.

Each is one channel of amounts in [0, 1], float32 HW1.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from dpkd.priors.base import mirror
from dpkd.priors.codecs import Map

Image = npt.NDArray[np.float32]

STRONG = 0.25
"""Minimum probability of a boundary: 4 to 5 % of the cells of natural images are on a crest of this strength."""


@dataclass(frozen=True)
class Derived:
    """A derived map: its inputs, its function, and what a reader of maps asks of a prior."""

    needs: tuple[str, ...]
    """Names of the stored input maps."""
    derive: Callable[[Mapping[str, Map]], Image]
    channels: int = 1
    nearest: bool = False
    flip: Callable[[Map], Map] = mirror


def foreground(maps: Mapping[str, Map]) -> Image:
    """Figure 1, ground 0: saliency above Otsu's threshold (Otsu 1979), by a majority in each superpixel.

    On the grid of the superpixels. If saliency is constant, the map is 0.
    """
    label_HW = maps["superpixel"][:, :, 0]
    saliency_HW = maps["saliency"][:, :, 0].astype(np.float32)
    if saliency_HW.shape != label_HW.shape:
        resized_HW = cv2.resize(saliency_HW, label_HW.shape[::-1], interpolation=cv2.INTER_LINEAR)
        saliency_HW = np.asarray(resized_HW, np.float32)
    level_HW = np.rint(np.clip(saliency_HW, 0, 1) * 255).astype(np.uint8)
    threshold, _ = cv2.threshold(level_HW, 0, 255, cv2.THRESH_OTSU)
    figure_N = (level_HW > threshold).ravel()
    size_R = np.bincount(label_HW.ravel())
    figure_R = np.bincount(label_HW.ravel(), weights=figure_N) > 0.5 * size_R
    return figure_R[label_HW].astype(np.float32)[:, :, None]


def boundary_distance(maps: Mapping[str, Map]) -> Image:
    """Distance to the nearest boundary, on the grid of the edges: 0 on it, 1 from an eighth of the longer side on.

    On a boundary, edge is at least `STRONG` and not smaller than both neighbours along x or along y (thinning as in
    Canny 1986, along the axes). The distance is Euclidean, between cells.
    """
    edge_HW = maps["edge"][:, :, 0].astype(np.float32)
    boundary_HW = (edge_HW >= STRONG) & (_crest(edge_HW) | _crest(edge_HW.T).T)
    if not boundary_HW.any():
        return np.ones((*edge_HW.shape, 1), np.float32)
    distance_HW = cv2.distanceTransform((~boundary_HW).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return np.minimum(distance_HW * np.float32(8 / max(edge_HW.shape)), np.float32(1))[:, :, None]


def _crest(edge_HW: Image) -> npt.NDArray[np.bool_]:
    """True for cells with no larger neighbour along x, and with a smaller one."""
    padded_HW = np.pad(edge_HW, ((0, 0), (1, 1)), mode="edge")
    left_HW, right_HW = padded_HW[:, :-2], padded_HW[:, 2:]
    return (edge_HW >= left_HW) & (edge_HW >= right_HW) & ((edge_HW > left_HW) | (edge_HW > right_HW))


DERIVED = {
    "foreground": Derived(("saliency", "superpixel"), foreground),
    "boundary_distance": Derived(("edge",), boundary_distance),
}
"""The derived maps by name."""


def derivable(stored: Mapping[str, object]) -> dict[str, Derived]:
    """The derived maps whose inputs are all stored."""
    return {name: derived for name, derived in DERIVED.items() if set(derived.needs) <= set(stored)}
