import numpy as np
import pytest
from skimage import feature

from dpkd.priors.base import ImageViews
from dpkd.priors.catalogue.orientation import Hog


def reference_hog(image_HWC, bins, cell):
    """The definition pixel by pixel, in float64."""
    height, width = image_HWC.shape[0] // cell, image_HWC.shape[1] // cell
    histogram_HWC = np.zeros((height, width, bins))
    padded_HWC = np.pad(image_HWC.astype(float), ((1, 1), (1, 1), (0, 0)), mode="reflect")
    for y in range(height * cell):
        for x in range(width * cell):
            dx_C = padded_HWC[y + 1, x + 2] - padded_HWC[y + 1, x]
            dy_C = padded_HWC[y + 2, x + 1] - padded_HWC[y, x + 1]
            channel = np.argmax(dx_C**2 + dy_C**2)
            position = np.degrees(np.arctan2(dy_C[channel], dx_C[channel])) % 180 / (180 / bins) - 0.5
            below = int(np.floor(position))
            magnitude = np.hypot(dx_C[channel], dy_C[channel])
            histogram_HWC[y // cell, x // cell, below % bins] += magnitude * (1 - position + below)
            histogram_HWC[y // cell, x // cell, (below + 1) % bins] += magnitude * (position - below)
    return histogram_HWC / np.maximum(np.linalg.norm(histogram_HWC, axis=2, keepdims=True), 1e-5)


@pytest.mark.parametrize(("bins", "cell"), [(9, 8), (6, 16)])
def test_histograms_agree_with_the_definition_pixel_by_pixel(scene, bins, cell):
    np.testing.assert_allclose(
        Hog(bins=bins, cell=cell).map(ImageViews(scene)), reference_hog(scene, bins, cell), atol=2e-3
    )


def test_histograms_are_those_of_scikit_image_but_for_the_sharing_of_votes(scene):
    other_HWC = feature.hog(
        scene,
        orientations=9,
        pixels_per_cell=(8, 8),
        cells_per_block=(1, 1),
        block_norm="L2",
        channel_axis=2,
        feature_vector=False,
    )[:, :, 0, 0]
    ours_HWC = Hog().map(ImageViews(scene))
    assert ours_HWC.shape == other_HWC.shape
    assert np.corrcoef(ours_HWC.ravel(), other_HWC.ravel())[0, 1] > 0.9


def test_upright_edges_fall_between_the_first_and_the_last_bin_so_that_a_mirrored_image_has_the_bins_reversed():
    image_HWC = np.zeros((16, 16, 3), np.uint8)
    image_HWC[:, 4:] = 200
    hog_HWC = Hog().map(ImageViews(image_HWC))
    np.testing.assert_allclose(hog_HWC[0, 0], np.array([1, 0, 0, 0, 0, 0, 0, 0, 1]) / np.sqrt(2), atol=1e-3)
    np.testing.assert_allclose(Hog().flip(hog_HWC), Hog().map(ImageViews(image_HWC[:, ::-1].copy())), atol=1e-6)


def test_the_grid_covers_the_whole_image_where_cells_do_not_divide_it(scene):
    hog_HWC = Hog().map(ImageViews(np.ascontiguousarray(scene[:60, :84])))
    assert hog_HWC.shape == (8, 10, 9)
    np.testing.assert_allclose(np.linalg.norm(hog_HWC, axis=2), 1, atol=1e-3)
