"""Maps that follow from stored ones and are made when a sample is read, at no cost in storage.

Each is one channel of amounts in [0, 1], float32 HW1.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from dpkd.priors.codecs import Map

Image = npt.NDArray[np.float32]

STRONG = 0.25
"""Probability of a boundary that counts: of the cells of natural images, 4 or 5 % are on a crest as strong."""


class Derived(NamedTuple):
    """How a map is made."""

    needs: tuple[str, ...]
    """Names of the stored maps that it is made from."""
    derive: Callable[[Mapping[str, Map]], Image]


def foreground(maps: Mapping[str, Map]) -> Image:
    """Figure 1, ground 0: saliency above Otsu's threshold (Otsu 1979), each superpixel going with its majority.

    On the grid of the superpixels. Where saliency is even there is no figure, and the map is 0.
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
    """How far the nearest boundary is, on the grid of the edges: 0 on it, 1 from an eighth of the longer side on.

    A boundary is where edge is at least `STRONG` and no smaller than at both neighbours along x or along y
    (a thinning as by Canny 1986, along the axes); the distance is Euclidean, between cells.
    """
    edge_HW = maps["edge"][:, :, 0].astype(np.float32)
    boundary_HW = (edge_HW >= STRONG) & (_crest(edge_HW) | _crest(edge_HW.T).T)
    if not boundary_HW.any():
        return np.ones((*edge_HW.shape, 1), np.float32)
    distance_HW = cv2.distanceTransform((~boundary_HW).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return np.minimum(distance_HW * np.float32(8 / max(edge_HW.shape)), np.float32(1))[:, :, None]


def _crest(edge_HW: Image) -> npt.NDArray[np.bool_]:
    """Where no neighbour along x is larger, and one is smaller."""
    padded_HW = np.pad(edge_HW, ((0, 0), (1, 1)), mode="edge")
    left_HW, right_HW = padded_HW[:, :-2], padded_HW[:, 2:]
    return (edge_HW >= left_HW) & (edge_HW >= right_HW) & ((edge_HW > left_HW) | (edge_HW > right_HW))


DERIVED = {
    "foreground": Derived(("saliency", "superpixel"), foreground),
    "boundary_distance": Derived(("edge",), boundary_distance),
}
"""The derived maps by name."""


def derivable(stored: Mapping[str, object]) -> dict[str, Derived]:
    """The derived maps for which all that they need is stored."""
    return {name: derived for name, derived in DERIVED.items() if set(derived.needs) <= set(stored)}
