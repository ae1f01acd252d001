import numpy as np
import pytest
from scipy import ndimage
from skimage import feature

from dpkd.priors.base import ImageViews
from dpkd.priors.catalogue.shape import FULL_SCALE, Ridge
from tests.priors.gratings import picture_of


def lines(width_px: int, level: float) -> ImageViews:
    """Upright lines 24 px apart on grey."""
    grey_HW = np.full((96, 96), 127.0)
    for left in range(12, 96, 24):
        grey_HW[:, left : left + width_px] = level
    return picture_of(grey_HW)


@pytest.mark.parametrize("width_px", [2, 4, 6])
def test_bright_and_dark_lines_light_their_own_channel(width_px):
    bright, dark = (Ridge(stride=2).map(lines(width_px, level)) for level in (227, 27))
    on_line = np.s_[10:-10, 6 : 6 + max(1, width_px // 2)]
    assert bright[on_line][..., 0].mean() > 2 * bright[on_line][..., 1].mean()
    assert dark[on_line][..., 1].mean() > 2 * dark[on_line][..., 0].mean()
    np.testing.assert_allclose(bright[..., 0], dark[..., 1], atol=2e-3)


def test_a_wide_line_is_found_at_a_wide_scale():
    fine, coarse = (Ridge(scales=(scale,), stride=1).map(lines(8, 227))[40:50, 15:17, 0].mean() for scale in (1.0, 4.0))
    assert coarse > 2 * fine


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_strength_agrees_with_the_hessian_of_scikit_image(photograph, scale):
    grey_HW = ImageViews(photograph).grey_HW.astype(np.float64)
    smooth_HW = ndimage.gaussian_filter(grey_HW, scale, mode="mirror")
    hessian = feature.hessian_matrix(smooth_HW, sigma=1e-3, mode="reflect", order="rc", use_gaussian_derivatives=False)
    low_HW = feature.hessian_matrix_eigvals(hessian)[1] * scale**2
    expected_HW = np.maximum(-low_HW, 0).reshape(24, 8, 32, 8).mean((1, 3))
    found_HW = Ridge(scales=(scale,)).map(ImageViews(photograph))[:, :, 0] ** 2 * FULL_SCALE
    unclipped = (expected_HW < 0.9 * FULL_SCALE)[1:-1, 1:-1]
    found, expected = found_HW[1:-1, 1:-1][unclipped], expected_HW[1:-1, 1:-1][unclipped]
    assert np.corrcoef(found, expected)[0, 1] > 0.97
    assert found.mean() == pytest.approx(expected.mean(), rel=0.2)
