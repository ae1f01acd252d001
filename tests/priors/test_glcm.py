import numpy as np
import pytest
from skimage import feature

from dpkd.priors.base import ImageViews
from dpkd.priors.catalogue.texture import Glcm
from tests.priors.gratings import picture_of

ANGLES = (0, np.pi / 4, np.pi / 2, 3 * np.pi / 4)


def reference(level_HW: np.ndarray) -> list[float]:
    """The five statistics of one cell by scikit-image."""
    counts = feature.graycomatrix(level_HW, [1], ANGLES, levels=8, symmetric=True)
    pooled = counts.sum(3, keepdims=True).astype(np.float64)
    p = pooled / pooled.sum()
    contrast, homogeneity, energy, correlation = (
        feature.graycoprops(p, name)[0, 0] for name in ("contrast", "homogeneity", "energy", "correlation")
    )
    entropy = feature.graycoprops(p, "entropy")[0, 0]
    if abs(entropy + (p[p > 0] * np.log2(p[p > 0])).sum()) < 1e-6:  # some versions count in bits
        entropy *= np.log(2)
    return [np.sqrt(contrast / 49), homogeneity, energy, entropy / np.log(64), (1 + correlation) / 2]


def test_statistics_agree_with_scikit_image(photograph):
    picture = ImageViews(photograph)
    found_HWC = Glcm().map(picture)
    for row, column in ((1, 6), (4, 3), (8, 9)):
        cell_HW = picture.grey8_HW[16 * row : 16 * row + 16, 16 * column : 16 * column + 16] >> 5
        np.testing.assert_allclose(found_HWC[row, column], reference(cell_HW), atol=2e-3)


@pytest.mark.parametrize("level", [0.0, 130.0])
def test_an_even_cell_is_without_contrast_and_entropy_and_wholly_regular(level):
    np.testing.assert_allclose(Glcm().map(picture_of(np.full((16, 16), level)))[0, 0], [0, 1, 1, 0, 1], atol=1e-5)


def test_a_chequerboard_is_all_contrast():
    y_HW, x_HW = np.mgrid[:16, :16]
    board, even = (Glcm().map(picture_of(grey))[0, 0] for grey in (255.0 * ((x_HW + y_HW) % 2), np.full((16, 16), 9.0)))
    assert board[0] > 0.6
    assert board[4] < 0.5 < even[4]
