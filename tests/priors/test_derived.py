import numpy as np
import pytest
from scipy import ndimage
from skimage import filters

from dpkd.priors.base import ImageViews
from dpkd.priors.catalogue.edge import Edge
from dpkd.priors.catalogue.regions import Superpixel
from dpkd.priors.catalogue.saliency import Saliency
from dpkd.priors.derived import DERIVED, STRONG, derivable

Foreground, BoundaryDistance = DERIVED["foreground"], DERIVED["boundary_distance"]


def test_foreground_is_saliency_above_otsu_s_threshold_where_every_cell_is_a_region():
    saliency_HW = np.random.default_rng(0).beta(0.5, 0.5, (20, 24)).astype(np.float32)
    label_HW = np.arange(480, dtype=np.int32).reshape(20, 24)
    level_HW = np.rint(saliency_HW * 255).astype(np.uint8)
    expected_HW = level_HW > filters.threshold_otsu(level_HW)
    found_HWC = Foreground.derive({"saliency": saliency_HW[:, :, None], "superpixel": label_HW[:, :, None]})
    np.testing.assert_array_equal(found_HWC[:, :, 0], expected_HW)
    assert found_HWC.dtype == np.float32


def test_a_region_goes_with_the_majority_of_its_cells():
    saliency_HW = np.array([[0.9, 0.9, 0.1, 0.1], [0.9, 0.1, 0.1, 0.9]], np.float32)
    label_HW = np.array([[0, 0, 1, 1], [0, 0, 1, 1]], np.int32)
    found_HWC = Foreground.derive({"saliency": saliency_HW[:, :, None], "superpixel": label_HW[:, :, None]})
    np.testing.assert_array_equal(found_HWC[:, :, 0], [[1, 1, 0, 0], [1, 1, 0, 0]])


def test_foreground_of_a_drawn_object_covers_it_and_little_else(scene):
    maps = {"saliency": Saliency().map(ImageViews(scene)), "superpixel": Superpixel(region_px=8).map(ImageViews(scene))}
    found_HW = Foreground.derive(maps)[:, :, 0] > 0
    y_HW, x_HW = np.mgrid[2:64:4, 2:96:4]
    disc_HW = (x_HW - 40) ** 2 + (y_HW - 30) ** 2 < 14**2
    bar_HW = (abs(x_HW - 67) < 6) & (abs(y_HW - 37) < 18)
    assert found_HW[disc_HW].mean() > 0.8
    assert (disc_HW | bar_HW)[found_HW].mean() > 0.8


def test_boundary_distance_agrees_with_scipy_on_a_thin_line():
    edge_HW = np.zeros((24, 32), np.float32)
    edge_HW[6] = 0.9
    edge_HW[5] = edge_HW[7] = 0.6  # thinned away
    line_HW = edge_HW == np.float32(0.9)
    found_HW = BoundaryDistance.derive({"edge": edge_HW[:, :, None]})[:, :, 0]
    expected_HW = np.minimum(ndimage.distance_transform_edt(~line_HW) * 8 / 32, 1)
    np.testing.assert_allclose(found_HW, expected_HW, atol=0.01)


def test_without_a_strong_edge_every_place_is_far_from_a_boundary():
    weak_HWC = np.full((8, 8, 1), STRONG - 0.1, np.float32)
    np.testing.assert_array_equal(BoundaryDistance.derive({"edge": weak_HWC}), np.ones((8, 8, 1)))


def test_distance_is_zero_on_the_rim_of_a_drawn_disc_and_grows_inwards(scene):
    found_HW = BoundaryDistance.derive({"edge": Edge().map(ImageViews(scene))})[:, :, 0]
    assert found_HW[15, 12:15].min() < 0.1  # the left end of the disc: 26, 30 px
    assert found_HW[15, 20] > 0.5


@pytest.mark.parametrize("name", DERIVED)
def test_flat_maps_of_samples_that_could_not_be_computed_are_taken(name):
    flat = {"saliency": np.full((1, 1, 1), 0.5, np.float32), "edge": np.full((1, 1, 1), 0.5, np.float32)}
    found_HWC = DERIVED[name].derive({**flat, "superpixel": np.zeros((1, 1, 1), np.int32)})
    assert found_HWC.shape == (1, 1, 1)
    assert np.isfinite(found_HWC).all()


def test_what_can_be_derived_follows_from_what_is_stored():
    assert list(derivable(dict.fromkeys(["edge", "superpixel"]))) == ["boundary_distance"]
    assert set(derivable(dict.fromkeys(["edge", "superpixel", "saliency"]))) == set(DERIVED)
