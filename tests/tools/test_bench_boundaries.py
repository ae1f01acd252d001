import numpy as np
import pytest
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching

from tools.bench_boundaries import boundary_counts, boundary_score, match, region_boundary, thin


def rectangle(size: int = 96) -> np.ndarray:
    label_HW = np.zeros((size, size), int)
    label_HW[20:70, 30:80] = 1
    return region_boundary(label_HW)


@pytest.mark.parametrize("reach_px", [1.0, 2.0, 3.7])
@pytest.mark.parametrize("density", [0.02, 0.1, 0.4])
def test_as_many_pixels_are_matched_as_in_the_matching_of_scipy(reach_px, density):
    random = np.random.default_rng(0)
    found_HW, drawn_HW = (random.random((40, 50)) < density for _ in range(2))
    matched_HW = match(found_HW, drawn_HW, reach_px=reach_px)
    distance = np.linalg.norm(np.argwhere(found_HW)[:, None] - np.argwhere(drawn_HW), axis=2)
    expected = (maximum_bipartite_matching(coo_matrix(distance <= reach_px).tocsr()) >= 0).sum()
    assert matched_HW.sum() == expected
    assert not (matched_HW & ~found_HW).any()


def test_a_boundary_lies_between_regions():
    np.testing.assert_array_equal(
        region_boundary(np.repeat([[0, 0, 0, 1, 1]], 5, axis=0))[1:-1], np.repeat([[0, 0, 1, 0, 0]], 3, axis=0)
    )


def test_a_thick_line_becomes_as_thin_as_a_pixel_and_stays_in_its_place():
    y_HW, x_HW = np.mgrid[:60, :60]
    for angle in np.radians([0, 30, 45, 80]):
        across_HW = (x_HW - 30) * np.cos(angle) + (y_HW - 30) * np.sin(angle)
        inner = np.s_[8:-8, 8:-8]
        kept_HW = thin(np.exp(-0.5 * (across_HW / 2) ** 2).astype(np.float32))[inner] > 0.5
        assert np.abs(across_HW[inner][kept_HW]).max() <= 1
        assert 42 <= kept_HW.sum() < 1.4 * 44


def test_what_everyone_drew_scores_one_and_so_does_a_shift_within_the_tolerance():
    drawn_HW = rectangle(400)  # the tolerance is 4.2 px
    for shift, expected in ((0, 1.0), (4, 1.0), (60, None)):
        shifted_HW = np.roll(drawn_HW, (shift, 0), (0, 1)).astype(np.float32)
        score = boundary_score([boundary_counts(shifted_HW, [drawn_HW, drawn_HW])])
        if expected is None:
            assert score.ods < 0.75  # the upright sides still lie on themselves
        else:
            assert score.ods == score.ois == expected


def test_precision_counts_a_pixel_that_anyone_drew_and_recall_every_annotator():
    first_HW, second_HW = np.zeros((200, 200), bool), np.zeros((200, 200), bool)
    first_HW[50, 40:160] = second_HW[150, 40:160] = True
    counts = boundary_counts((first_HW | second_HW).astype(np.float32), [first_HW, second_HW], thresholds=(0.2,))
    assert (counts.right_T, counts.found_T, counts.recalled_T, counts.drawn_T) == (240, 240, 240, 240)
    counts = boundary_counts(first_HW.astype(np.float32), [first_HW, second_HW], thresholds=(0.2,))
    assert (counts.right_T, counts.found_T, counts.recalled_T, counts.drawn_T) == (120, 120, 120, 240)
    score = boundary_score([counts], thresholds=(0.2,))
    assert (score.precision, score.recall) == (1, 0.5)
    assert score.ods == pytest.approx(2 / 3)


def test_each_image_s_own_threshold_is_never_worse_than_one_for_all():
    random = np.random.default_rng(0)
    drawn_HW = rectangle()
    maps = [
        np.maximum(drawn_HW * level, 0.5 * level * random.random((96, 96))).astype(np.float32) for level in (0.3, 1)
    ]
    score = boundary_score([boundary_counts(map_HW, [drawn_HW]) for map_HW in maps])
    assert score.ois > score.ods + 0.05
