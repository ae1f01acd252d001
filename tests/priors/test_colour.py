import numpy as np
import pytest
from skimage import color

from dpkd.priors.base import ImageViews
from dpkd.priors.catalogue.colour import Colour


@pytest.mark.parametrize("stride", [4, 16])  # 16: at half size
def test_means_and_deviations_agree_with_scikit_image(photograph, stride):
    half_HWC = np.rint(photograph.reshape(96, 2, 128, 2, 3).mean((1, 3))).astype(np.uint8)
    lab_HWC = color.rgb2lab(half_HWC if stride == 16 else photograph)
    lab_HWC = lab_HWC.reshape(192 // stride, -1, 256 // stride, lab_HWC.shape[1] * stride // 256, 3)
    found_HWC = Colour(stride=stride).map(ImageViews(photograph))
    mean_HWC, deviation_HWC = lab_HWC.mean((1, 3)), lab_HWC.std((1, 3))
    np.testing.assert_allclose(found_HWC[:, :, 0] * 100, mean_HWC[:, :, 0], atol=0.3)
    np.testing.assert_allclose(found_HWC[:, :, 1:3] * 256 - 128, mean_HWC[:, :, 1:], atol=0.6)
    np.testing.assert_allclose(found_HWC[:, :, 3:] * 50, np.minimum(deviation_HWC, 50), atol=0.6)


@pytest.mark.parametrize("light", [(1.0, 0.8, 0.6), (0.7, 0.9, 1.0)])
def test_grey_world_takes_the_colour_of_the_lamp_away(photograph, light):
    under_lamp = np.rint(photograph * np.array(light)).astype(np.uint8)
    plain, lamp = (Colour().map(ImageViews(image))[:, :, 1:3] for image in (photograph, under_lamp))
    balanced, balanced_lamp = (
        Colour(grey_world=True).map(ImageViews(image))[:, :, 1:3] for image in (photograph, under_lamp)
    )
    assert np.abs(balanced - balanced_lamp).mean() < 0.2 * np.abs(plain - lamp).mean()
