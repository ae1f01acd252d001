"""How well predicted masks agree with true ones: IoU, Dice, boundary F, boundary IoU, Hausdorff distance.

Axes: H W pixels, K class, N image. Only counts and distances of an image are kept, never its masks.
"""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bits = NDArray[np.bool_]

TOLERANCE_PX = 2.0
"""Distance at which boundary pixels of the boundary F agree."""
BAND = 0.02
"""Width of the band of the boundary IoU, as a share of the diagonal (Cheng et al. 2021)."""


class Agreement(NamedTuple):
    """One predicted mask against the true one, for each class; for several images each field is NK."""

    overlap_K: Floats
    """Pixels that both have."""
    union_K: Floats
    true_K: Floats
    band_overlap_K: Floats
    band_union_K: Floats
    boundary_f_K: Floats
    """1 if neither has a boundary."""
    hd95_K: Floats
    """In pixels: 0 if neither has a boundary, the diagonal if one has none."""


def compare_masks(predicted_HW: NDArray[np.integer], true_HW: NDArray[np.integer], *, num_classes: int) -> Agreement:
    """Compares masks of class numbers; pixels whose true class is -1 belong to no class in either mask."""
    predicted_HW = np.where(true_HW < 0, -1, predicted_HW)
    diagonal = float(np.hypot(*true_HW.shape))
    rows = []
    for k in range(num_classes):
        predicted, true = predicted_HW == k, true_HW == k
        bands = [band(mask, width=max(1, round(BAND * diagonal))) for mask in (predicted, true)]
        distances = boundary_distances(predicted, true)
        rows.append(
            (
                (predicted & true).sum(),
                (predicted | true).sum(),
                true.sum(),
                (bands[0] & bands[1]).sum(),
                (bands[0] | bands[1]).sum(),
                _boundary_f(*distances),
                _hd95(*distances, worst=diagonal),
            )
        )
    return Agreement(*np.array(rows, np.float64).T)


def band(mask_HW: Bits, *, width: int) -> Bits:
    """The pixels of a mask within `width` of its contour, by erosions with a 3 x 3 square; outside is no mask.

    `mask_to_boundary` of Cheng et al. 2021 (Boundary IoU).
    """
    padded = np.pad(mask_HW, 1).astype(np.uint8)
    inner = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=width, borderValue=0)
    return mask_HW & (inner[1:-1, 1:-1] == 0)


def boundary_distances(predicted_HW: Bits, true_HW: Bits) -> tuple[Floats, Floats]:
    """The distance of each boundary pixel of either mask to the nearest one of the other; infinite without one.

    A boundary pixel has a pixel of another class among its eight neighbours; the frame of the image is no boundary.
    """
    square, found = np.ones((3, 3), np.uint8), []
    for mask_HW in (predicted_HW, true_HW):
        inner = cv2.erode(mask_HW.astype(np.uint8), square, borderType=cv2.BORDER_REPLICATE)
        found.append(mask_HW & (inner == 0))
    distances = []
    for own, other in (found, found[::-1]):
        if other.any():
            far_HW = cv2.distanceTransform((~other).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
            distances.append(far_HW[own].astype(np.float64))
        else:
            distances.append(np.full(int(own.sum()), np.inf))
    return distances[0], distances[1]


def _boundary_f(from_predicted: Floats, from_true: Floats) -> float:
    """The harmonic mean of precision and recall of boundary pixels within 2 px (Csurka et al. 2013)."""
    if not len(from_predicted) or not len(from_true):
        return float(len(from_predicted) == len(from_true))
    precision, recall = (float((each <= TOLERANCE_PX).mean()) for each in (from_predicted, from_true))
    return 2 * precision * recall / max(precision + recall, 1e-12)


def _hd95(from_predicted: Floats, from_true: Floats, *, worst: float) -> float:
    """The 95th percentile of the distances of both boundaries together, as MedPy's `hd95`."""
    both = np.concatenate([from_predicted, from_true])
    return float(np.percentile(both.clip(max=worst), 95)) if len(both) else 0.0


def mask_scores(rows: Sequence[Agreement], *, outlined: Sequence[int]) -> dict[str, Floats]:
    """By figure, a value for each image [N] whose mean over the images is the figure of the data set.

    `mean_dice`, `boundary_iou`, `boundary_f`, `mean_iou`; boundaries are those of the classes `outlined`. IoU and Dice
    are ratios of sums over all images, mean over classes with a true pixel. Their values are linearised, so that the
    deviation of their mean is that of the infinitesimal jackknife (Efron 1982), close to the bootstrap's.
    """
    overlap_NK, union_NK, true_NK, band_overlap_NK, band_union_NK, boundary_f_NK, _ = np.stack(rows, axis=1)
    present = np.flatnonzero(true_NK.sum(0))
    edged = [k for k in outlined if k in present]
    return {
        "mean_dice": _ratio_values(2 * overlap_NK[:, present], (overlap_NK + union_NK)[:, present]),
        "boundary_iou": _ratio_values(band_overlap_NK[:, edged], band_union_NK[:, edged]),
        "boundary_f": boundary_f_NK[:, edged].mean(1),
        "mean_iou": _ratio_values(overlap_NK[:, present], union_NK[:, present]),
    }


def _ratio_values(part_NK: Floats, whole_NK: Floats) -> Floats:
    """Values [N] whose mean is `mean_K(Σ part / Σ whole)`, with the influence of each image on it."""
    total_K = whole_NK.sum(0).clip(min=1)
    ratio_K = part_NK.sum(0) / total_K
    values: Floats = (ratio_K + len(part_NK) * (part_NK - ratio_K * whole_NK) / total_K).mean(1)
    return values


def class_figures(rows: Sequence[Agreement], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """`iou` and `dice` of each class with a true pixel over all images, and `hd95_px`, the mean over images."""
    images = Agreement(*np.stack(rows, axis=1))
    overlap_K, union_K, true_K = (each_NK.sum(0) for each_NK in (images.overlap_K, images.union_K, images.true_K))
    hd95_K = images.hd95_K.mean(0)
    return {
        name: {
            "iou": float(overlap_K[k] / union_K[k]),
            "dice": float(2 * overlap_K[k] / (overlap_K[k] + union_K[k])),
            "hd95_px": float(hd95_K[k]),
        }
        for k, name in enumerate(names)
        if true_K[k]
    }
