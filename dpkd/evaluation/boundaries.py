"""How well a boundary map agrees with boundaries that people drew: precision, recall and F, as the BSDS500 benchmark.

A map is thinned, cut at each of a row of thresholds, and matched one to one with each annotator's boundary, pixels no
further apart than `TOLERANCE` (Martin, Fowlkes & Malik 2004; Arbeláez et al. 2011). A boundary pixel of the map is
right if it is matched with anyone's; each annotator's own pixels are to be recalled. ODS is the best F of one threshold
for all images, OIS that of each image's own best.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

Map = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

TOLERANCE = 0.0075
"""Of the image's diagonal: how far apart matched pixels may be."""
FRAME_PX = 5
THRESHOLDS = tuple(np.round(np.linspace(0.01, 0.99, 50), 4).tolist())


@dataclass(frozen=True)
class Counts:
    """Boundary pixels of one image at each of T thresholds, int64."""

    recalled_T: npt.NDArray[np.int64]
    """Of the annotators' pixels."""
    drawn_T: npt.NDArray[np.int64]
    """By all annotators together."""
    right_T: npt.NDArray[np.int64]
    """Of the map's pixels."""
    found_T: npt.NDArray[np.int64]
    """In the map."""


@dataclass(frozen=True)
class Score:
    """Best F of one threshold for all images, the threshold, and the F of each image's own best threshold."""

    ods: float
    threshold: float
    ois: float
    precision: float
    """At the best threshold, as `recall`."""
    recall: float


def region_boundary(label_HW: npt.NDArray[np.integer]) -> Mask:
    """Where the region to the right, below, or right below is another one, thinned to lines of one pixel."""
    padded_HW = np.pad(label_HW, ((0, 1), (0, 1)), mode="edge")
    here, right, below, across = label_HW, padded_HW[:-1, 1:], padded_HW[1:, :-1], padded_HW[1:, 1:]
    return _lines((here != right) | (here != below) | (here != across))


def _lines(mask_HW: npt.NDArray[np.bool_]) -> Mask:
    """The mask thinned to lines of one pixel (Guo & Hall 1989)."""
    byte_HW = mask_HW.astype(np.uint8) * np.uint8(255)
    return np.asarray(cv2.ximgproc.thinning(byte_HW, thinningType=cv2.ximgproc.THINNING_GUOHALL) > 0)


def thin(map_HW: Map) -> Map:
    """The slightly smoothed map where it is a crest, 0 elsewhere: no smaller than one pixel to either side of it.

    The direction across a crest is that of the strongest downward curvature. What lies within `FRAME_PX` of the frame
    is left out, where a gradient sees no further.
    """
    from dpkd.priors.catalogue.edge import crests  # noqa: PLC0415 (numba loads where it is used)

    thin_HW = crests(map_HW, direction_px=2.0, fine_px=1.0)
    inside_HW = np.zeros_like(thin_HW)
    inside = np.s_[FRAME_PX:-FRAME_PX, FRAME_PX:-FRAME_PX]
    inside_HW[inside] = thin_HW[inside]
    return inside_HW


def boundary_counts(map_HW: Map, drawn: Sequence[Mask], *, thresholds: Sequence[float] = THRESHOLDS) -> Counts:
    """Counts of a boundary map in [0, 1], thinned here, against each annotator's boundary of the same size."""
    from dpkd.evaluation.boundary_matching import match  # noqa: PLC0415

    thin_HW = thin(map_HW)
    reach_px = TOLERANCE * float(np.hypot(*map_HW.shape))
    recalled, right, found = [], [], []
    for threshold in thresholds:
        cut_HW = _lines(thin_HW >= threshold)
        right_HW, num_recalled = np.zeros_like(cut_HW), 0
        for drawn_HW in drawn:
            matched_HW = match(cut_HW, drawn_HW, reach_px=reach_px)
            right_HW |= matched_HW
            num_recalled += int(matched_HW.sum())
        recalled.append(num_recalled)
        right.append(int(right_HW.sum()))
        found.append(int(cut_HW.sum()))
    total = sum(int(each.sum()) for each in drawn)
    return Counts(np.array(recalled), np.full(len(thresholds), total), np.array(right), np.array(found))


def boundary_score(images: Sequence[Counts], *, thresholds: Sequence[float] = THRESHOLDS) -> Score:
    """ODS and OIS over images."""
    table = np.array([[each.recalled_T, each.drawn_T, each.right_T, each.found_T] for each in images])
    total_4T = table.sum(0)
    f_T, own_NT = _f(total_4T), _f(np.moveaxis(table, 1, 0))
    best, own_best_N = int(f_T.argmax()), own_NT.argmax(1)
    own_4 = table[np.arange(len(images)), :, own_best_N].sum(0)
    recalled, drawn, right, found = total_4T[:, best]
    return Score(
        ods=float(f_T[best]),
        threshold=float(thresholds[best]),
        ois=float(_f(own_4)),
        precision=float(right / max(found, 1)),
        recall=float(recalled / max(drawn, 1)),
    )


def _f(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Harmonic mean of recall and precision along the first axis: recalled, drawn, right, found."""
    recalled, drawn, right, found = counts.astype(np.float64)
    recall, precision = recalled / np.maximum(drawn, 1), right / np.maximum(found, 1)
    return np.asarray(2 * recall * precision / np.maximum(recall + precision, 1e-12))
