import colorsys

import numpy as np
import pytest

from dpkd.priors.base import ImageViews
from dpkd.priors.catalogue.colour import Hue


def test_shares_agree_with_the_hues_of_the_standard_library(photograph):
    cell_HWC = photograph[16:32, 96:112] / 255
    expected = np.zeros(12)
    for pixel in cell_HWC.reshape(-1, 3):
        hue, saturation, _ = colorsys.rgb_to_hsv(*pixel)
        expected[int(hue * 12) % 12] += saturation / 256
    np.testing.assert_allclose(Hue().map(ImageViews(photograph))[1, 6] ** 2, expected, atol=0.03)


@pytest.mark.parametrize(("rgb", "bin_"), [((255, 20, 0), 0), ((200, 190, 0), 1), ((0, 255, 20), 4), ((30, 0, 255), 8)])
def test_a_plain_colour_fills_its_bin(rgb, bin_):
    shares_C = Hue().map(ImageViews(np.full((16, 16, 3), rgb, np.uint8)))[0, 0]
    assert shares_C.argmax() == bin_
    assert shares_C[bin_] > 0.95
    assert np.delete(shares_C, bin_).max() == 0


def test_grey_has_no_hue():
    assert Hue().map(ImageViews(np.full((16, 16, 3), 120, np.uint8))).max() == 0
