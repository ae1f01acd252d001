"""Figures of masks against brute force over pixels, SciPy, and the bootstrap."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.distance import cdist

from dpkd.evaluation.masks import Agreement, band, boundary_distances, class_figures, compare_masks, mask_scores

Bits = NDArray[np.bool_]


def blobs(seed: int, *, classes: int = 2, size: tuple[int, int] = (40, 52)) -> NDArray[np.int64]:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=size), 4)
    return np.digitize(noise, np.quantile(noise, np.linspace(0, 1, classes + 1)[1:-1]))


def boundary(mask: Bits) -> NDArray[np.int64]:
    """The pixels with a pixel of another class among their eight neighbours, pixel by pixel."""
    found = []
    for y, x in np.argwhere(mask):
        near = mask[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
        if not near.all():
            found.append((y, x))
    return np.array(found).reshape(-1, 2)


@pytest.mark.parametrize("seed", range(3))
def test_boundary_figures_are_those_of_all_pairs_of_pixels(seed: int) -> None:
    predicted, true = blobs(seed) == 1, blobs(seed + 10) == 1
    distance = cdist(boundary(predicted), boundary(true))
    from_predicted, from_true = boundary_distances(predicted, true)
    np.testing.assert_allclose(np.sort(from_predicted), np.sort(distance.min(1)), rtol=1e-5)
    np.testing.assert_allclose(np.sort(from_true), np.sort(distance.min(0)), rtol=1e-5)
    row = compare_masks(predicted.astype(int), true.astype(int), num_classes=2)
    precision, recall = (distance.min(1) <= 2).mean(), (distance.min(0) <= 2).mean()
    np.testing.assert_allclose(row.boundary_f_K[1], 2 * precision * recall / (precision + recall))
    both = np.concatenate([distance.min(1), distance.min(0)])
    np.testing.assert_allclose(row.hd95_K[1], np.percentile(both, 95), rtol=1e-5)
    assert row.overlap_K[1] == (predicted & true).sum()
    assert row.union_K[1] == (predicted | true).sum()


def test_the_band_is_what_erosions_take_away() -> None:
    mask = blobs(4) == 1
    for width in (1, 3):
        inner = ndimage.binary_erosion(mask, np.ones((3, 3)), iterations=width)  # outside of the image is no mask
        np.testing.assert_array_equal(band(mask, width=width), mask & ~inner)
    assert band(np.ones((9, 9), bool), width=2).sum() == 81 - 25


def test_masks_without_a_boundary_and_pixels_without_a_class() -> None:
    none, some = np.zeros((30, 40), int), np.zeros((30, 40), int)
    some[5:9, 5:9] = 1
    same, missed = compare_masks(none, none, num_classes=2), compare_masks(none, some, num_classes=2)
    assert (same.boundary_f_K[1], same.hd95_K[1]) == (1, 0)
    assert (missed.boundary_f_K[1], missed.hd95_K[1]) == (0, 50)  # the diagonal of 30 x 40
    true = some.copy()
    true[5:9, 5:9] = -1  # without a class, what is predicted there does not count
    ignored = compare_masks(some, true, num_classes=2)
    np.testing.assert_array_equal(ignored.union_K, [30 * 40 - 16, 0])
    np.testing.assert_array_equal(ignored.overlap_K, [30 * 40 - 16, 0])


def rows_of(seed: int, count: int, *, shift: int) -> list[Agreement]:
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        true = blobs(100 * seed + i, classes=3, size=(24, 24))
        predicted = np.roll(true, rng.integers(0, shift + 1), axis=1)
        rows.append(compare_masks(predicted, true, num_classes=4))  # no pixel has the last class
    return rows


def mean_iou(rows: list[Agreement]) -> float:
    overlap, union = (np.sum([getattr(row, name) for row in rows], 0)[:3] for name in ("overlap_K", "union_K"))
    return float((overlap / union).mean())


def test_the_values_of_images_have_the_figure_as_mean_and_the_interval_of_the_bootstrap() -> None:
    one, two = rows_of(1, 60, shift=3), rows_of(1, 60, shift=6)
    scores = [mask_scores(rows, outlined=[0, 1, 2]) for rows in (one, two)]
    for rows, values in zip((one, two), scores, strict=True):
        np.testing.assert_allclose(values["mean_iou"].mean(), mean_iou(rows), rtol=1e-12)
        figures = class_figures(rows, ["a", "b", "c", "d"])
        assert list(figures) == ["a", "b", "c"]
        np.testing.assert_allclose(np.mean([each["iou"] for each in figures.values()]), mean_iou(rows))
        np.testing.assert_allclose(np.mean([each["dice"] for each in figures.values()]), values["mean_dice"].mean())
    rng = np.random.default_rng(0)
    drawn = [rng.integers(0, 60, 60) for _ in range(1000)]
    bootstrap = [[mean_iou([rows[i] for i in draw]) for draw in drawn] for rows in (one, two)]
    gain = scores[0]["mean_iou"] - scores[1]["mean_iou"]
    np.testing.assert_allclose(scores[0]["mean_iou"].std(ddof=1) / 60**0.5, np.std(bootstrap[0]), rtol=0.1)
    np.testing.assert_allclose(
        gain.std(ddof=1) / 60**0.5, np.std(np.array(bootstrap[0]) - np.array(bootstrap[1])), rtol=0.1
    )
    # two networks that agree on each image have no interval
    assert (scores[0]["mean_iou"] - mask_scores(one, outlined=[0, 1, 2])["mean_iou"]).std() == 0


def test_the_figures_of_a_perfect_network_are_one() -> None:
    rows = [compare_masks(blobs(i), blobs(i), num_classes=2) for i in range(3)]
    for values in mask_scores(rows, outlined=[1]).values():
        np.testing.assert_allclose(values, 1)
    assert class_figures(rows, ["ground", "figure"])["figure"] == {"iou": 1.0, "dice": 1.0, "hd95_px": 0.0}
