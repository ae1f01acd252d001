import numpy as np
import pytest
from skimage import feature

from dpkd.priors.base import ImageViews
from dpkd.priors.catalogue.orientation import NOISE, Orientation
from tests.priors.gratings import grating, picture_of


@pytest.mark.parametrize("degrees", [0, 22.5, 45, 90, 120, 157.5])
def test_a_grating_is_coherent_and_its_direction_is_found(degrees):
    coherence, cos, sin = Orientation().map(grating(degrees, wavelength_px=12))[1:-1, 1:-1].mean((0, 1))
    assert coherence > 0.95
    found = np.degrees(np.arctan2(2 * sin - 1, 2 * cos - 1)) / 2 % 180
    assert abs((found - degrees + 90) % 180 - 90) < 2


def test_cells_agree_with_the_structure_tensor_of_scikit_image(photograph):
    picture = ImageViews(photograph)
    grey_HW = picture.grey8_HW.astype(np.float64)
    yy_HW, xy_HW, xx_HW = feature.structure_tensor(grey_HW, sigma=1e-3, mode="reflect", order="rc")
    # of gradients that are 8 times the slope
    xx, yy, xy = (each.reshape(12, 16, 16, 16).mean((1, 3)) / 64 for each in (xx_HW, yy_HW, xy_HW))
    length = np.hypot(xx - yy, 2 * xy)
    found_HWC = Orientation().map(picture)
    clear = np.zeros((12, 16), bool)
    clear[1:-1, 1:-1] = (length > 10 * NOISE)[1:-1, 1:-1]  # at the frame the two continue the image differently
    expected_HW = length / (xx + yy + NOISE)
    np.testing.assert_allclose(found_HWC[1:-1, 1:-1, 0], expected_HW[1:-1, 1:-1], atol=0.01)
    np.testing.assert_allclose(2 * found_HWC[:, :, 1][clear] - 1, (xx - yy)[clear] / length[clear], atol=0.02)
    np.testing.assert_allclose(2 * found_HWC[:, :, 2][clear] - 1, 2 * xy[clear] / length[clear], atol=0.02)


def test_an_even_cell_has_no_coherence_and_no_direction():
    map_HWC = Orientation().map(picture_of(np.full((32, 32), 90.0)))
    np.testing.assert_allclose(map_HWC, np.broadcast_to([0, 0.5, 0.5], map_HWC.shape), atol=1e-6)
