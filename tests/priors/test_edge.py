import numpy as np
import pytest
from scipy import ndimage
from skimage import color

from dpkd.priors.edge import Edge
from dpkd.priors.picture import Picture


def reference_edge(image_HWC, scales, chroma):
    """The definition in float64, with SciPy's Gaussian derivatives and scikit-image's Lab."""
    lab_HWC = color.rgb2lab(image_HWC) * (1, chroma, chroma)
    total_HW = np.zeros(image_HWC.shape[:2])
    for scale in scales:
        tensor_HW22 = np.zeros((*image_HWC.shape[:2], 2, 2))
        for channel_HW in np.moveaxis(lab_HWC, 2, 0):
            gradient = [ndimage.gaussian_filter(channel_HW, scale, order, mode="mirror") for order in ((0, 1), (1, 0))]
            gradient_HW2 = np.stack(gradient, axis=2)
            tensor_HW22 += gradient_HW2[..., :, None] * gradient_HW2[..., None, :]
        total_HW += scale * np.sqrt(np.linalg.eigvalsh(tensor_HW22)[..., 1].clip(0))
    return np.sqrt(np.minimum(total_HW / len(scales) / 64, 1))


@pytest.mark.parametrize(("scales", "chroma"), [((1.5, 3.0), 3.0), ((2.0,), 1.0)])
def test_edge_strength_agrees_with_scipy_and_scikit_image(scene, scales, chroma):
    edge_HW = Edge(scales=scales, chroma=chroma, stride=1).map(Picture(scene))[:, :, 0]
    expected_HW = reference_edge(scene, scales, chroma)
    assert np.abs(edge_HW - expected_HW).mean() < 0.01
    assert np.corrcoef(edge_HW.ravel(), expected_HW.ravel())[0, 1] > 0.998


def test_a_step_from_black_to_white_has_the_strength_that_theory_gives_at_every_scale():
    image_HWC = np.zeros((32, 64, 3), np.uint8)
    image_HWC[:, 32:] = 255  # lightness 0 to 100: s · 100 / (s √2π) at the step, whatever the scale
    for scale in (1.5, 3.0, 5.0):
        edge_HW = Edge(scales=(scale,), stride=1).map(Picture(image_HWC))[:, :, 0]
        assert edge_HW.max() == pytest.approx(np.sqrt(100 / np.sqrt(2 * np.pi) / 64), rel=0.06)
        assert set(edge_HW[16].argsort()[-2:]) == {31, 32}


def test_grey_and_even_images_have_no_edges_and_colour_alone_makes_one():
    image_HWC = np.full((16, 16, 3), 90, np.uint8)
    assert Edge().map(Picture(image_HWC)).max() < 1e-3
    image_HWC[:, 8:] = (113, 80, 60)  # about the same lightness, another colour
    assert Edge(stride=1).map(Picture(image_HWC)).max() > 0.4


def test_smoothing_first_lowers_the_edges_of_noise_more_than_those_of_objects(scene):
    plain_HW, smooth_HW = (Edge(smooth=smooth, stride=1).map(Picture(scene))[:, :, 0] for smooth in (False, True))
    ratio_HW = smooth_HW / np.maximum(plain_HW, 1e-3)
    rim, ground = ratio_HW[30, 52:57].mean(), ratio_HW[2:10, 78:94].mean()
    assert rim > 0.8
    assert ground < 0.8 * rim
