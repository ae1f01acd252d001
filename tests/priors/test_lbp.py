import numpy as np
import pytest
from skimage import feature

from dpkd.priors.base import ImageViews
from dpkd.priors.catalogue.texture import Lbp, uniform_patterns
from tests.priors.gratings import picture_of


def test_patterns_agree_with_scikit_image_but_where_neighbours_tie(photograph):
    grey_HW = ImageViews(photograph).grey8_HW
    expected_HW = feature.local_binary_pattern(grey_HW, 8, 1, method="uniform")
    inside = (slice(1, -1), slice(1, -1))
    assert (uniform_patterns(grey_HW)[inside] == expected_HW[inside]).mean() > 0.98


def test_shares_are_those_of_the_patterns_in_each_cell(photograph):
    pattern_HW = uniform_patterns(ImageViews(photograph).grey8_HW)
    expected = [np.bincount(pattern_HW[16:32, x : x + 16].ravel(), minlength=10) / 256 for x in range(0, 256, 16)]
    np.testing.assert_allclose(Lbp().map(ImageViews(photograph))[1] ** 2, expected, atol=1e-5)


def test_a_pixel_that_two_cells_share_counts_in_both_by_area():
    grey_HW = np.zeros((2, 3))  # cells of 2 x 1.5 pixels
    grey_HW[:, 1] = 100
    shares_WC = Lbp(stride=2).map(picture_of(grey_HW))[0] ** 2
    np.testing.assert_allclose(shares_WC.sum(1), 1, atol=1e-6)
    pattern_HW = uniform_patterns(picture_of(grey_HW).grey8_HW)
    left = [(pattern_HW[:, 0] == k).sum() / 3 + (pattern_HW[:, 1] == k).sum() / 6 for k in range(10)]
    np.testing.assert_allclose(shares_WC[0], left, atol=1e-6)


@pytest.mark.parametrize(("gain", "shift"), [(2, 0), (1, 60), (2, 40)])
def test_light_that_is_brighter_or_stronger_changes_nothing(gain, shift):
    grey_HW = np.random.default_rng(0).integers(0, 100, (32, 32))
    np.testing.assert_array_equal(Lbp().map(picture_of(grey_HW)), Lbp().map(picture_of(grey_HW * gain + shift)))


def test_an_even_image_has_one_pattern():
    np.testing.assert_array_equal(Lbp().map(picture_of(np.full((16, 16), 7.0)))[0, 0], np.eye(10)[8])
