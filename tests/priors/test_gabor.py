import numpy as np
import pytest
from scipy import ndimage
from skimage import filters

from dpkd.priors.base import ImageViews
from dpkd.priors.catalogue.texture import FULL_SCALE, SIGMA_PX, WAVELENGTH_PX, Gabor
from tests.priors.gratings import grating, picture_of


@pytest.mark.parametrize(("direction", "degrees"), enumerate((0, 45, 90, 135)))
@pytest.mark.parametrize("octave", [0, 1, 2])
def test_a_grating_lights_the_channel_of_its_direction_and_octave(direction, degrees, octave):
    picture = grating(degrees, wavelength_px=4 * 2**octave, size=128, amplitude=30)
    answer_C = Gabor().map(picture)[2:-2, 2:-2].mean((0, 1))
    assert answer_C.argmax() == 4 * octave + direction
    if octave == 0:  # an amplitude of 30 is answered by 30; averaging to half size lowers the coarser ones
        assert answer_C.max() == pytest.approx(np.sqrt(30 / FULL_SCALE), rel=0.08)


@pytest.mark.parametrize("degrees", [0, 45])
def test_amplitudes_agree_with_the_gabor_kernels_of_scikit_image(photograph, degrees):
    picture = ImageViews(photograph)
    kernel = filters.gabor_kernel(1 / WAVELENGTH_PX, np.radians(degrees), sigma_x=SIGMA_PX, sigma_y=SIGMA_PX)
    kernel = kernel - np.abs(kernel) / np.abs(kernel).sum() * kernel.sum()  # no answer to even light
    grey_HW = picture.grey_HW.astype(np.float64)
    parts = [ndimage.convolve(grey_HW, each, mode="mirror") for each in (kernel.real, kernel.imag)]
    expected_HW = 2 * np.hypot(*parts).reshape(12, 16, 16, 16).mean((1, 3)) / np.abs(kernel).sum()
    found_HW = Gabor().map(picture)[:, :, degrees // 45] ** 2 * FULL_SCALE
    unclipped = expected_HW < 0.9 * FULL_SCALE
    assert np.corrcoef(found_HW[unclipped], expected_HW[unclipped])[0, 1] > 0.995
    # scikit-image cuts a slanted kernel at 2.2 deviations
    assert found_HW[unclipped].sum() == pytest.approx(expected_HW[unclipped].sum(), rel=0.08)


def test_even_light_has_no_texture():
    assert Gabor().map(picture_of(np.full((48, 48), 180.0))).max() < 1e-2
