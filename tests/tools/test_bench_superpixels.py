import numpy as np
import pytest

from tools.bench_superpixels import figures

DRAWN_HW = np.arange(40).repeat(30).reshape(40, 30) // 20  # upper and lower half


def test_regions_that_keep_to_what_was_drawn_have_no_error():
    parts_HW = 2 * DRAWN_HW + np.arange(30) // 15
    assert figures(parts_HW, DRAWN_HW) == (1.0, 1.0, 0.0)


def test_a_region_across_a_boundary_leaks_its_smaller_part():
    label_HW = np.arange(40).repeat(30).reshape(40, 30) // 25  # 5 rows too low, 0.0075 of the diagonal is less
    recall, accuracy, leak = figures(label_HW, DRAWN_HW)
    assert recall == 0
    assert accuracy == pytest.approx(35 / 40)
    assert leak == pytest.approx(2 * 5 / 40)  # in both annotated regions
