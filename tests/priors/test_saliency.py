import numpy as np
import pytest
from scipy import ndimage

from dpkd.priors.base import ImageViews
from dpkd.priors.catalogue.saliency import Saliency, barrier_distance


def exact_barrier(value_HW):
    """The exact distance: the narrowest band of values within which a pixel is connected to the frame."""
    levels = np.unique(value_HW)
    exact_HW = np.full(value_HW.shape, np.inf)
    frame_HW = np.ones(value_HW.shape, bool)
    frame_HW[1:-1, 1:-1] = False
    for low in levels:
        for high in levels[levels >= low]:
            part_HW, _ = ndimage.label((value_HW >= low) & (value_HW <= high))
            reached_HW = np.isin(part_HW, np.unique(part_HW[frame_HW])) & (part_HW > 0)
            exact_HW[reached_HW] = np.minimum(exact_HW[reached_HW], int(high) - int(low))
    return exact_HW


def test_the_raster_scan_never_undercuts_the_exact_barrier_distance_and_comes_close_to_it():
    random = np.random.default_rng(1)
    over, settled = [], []
    for _ in range(8):
        value_HW = (ndimage.gaussian_filter(random.uniform(0, 1, (24, 20)), 1.5) * 40).astype(np.uint8) * 10
        distance_HW, exact_HW = barrier_distance(value_HW[:, :, None], 3), exact_barrier(value_HW)
        assert (distance_HW >= exact_HW).all()
        over.append((distance_HW - exact_HW).mean() / exact_HW.mean())
        settled.append((barrier_distance(value_HW[:, :, None], 20) - exact_HW).mean() / exact_HW.mean())
    assert np.mean(over) < 0.2
    assert np.mean(settled) <= np.mean(over)


def test_the_barrier_distance_of_an_island_is_its_contrast_and_of_a_gentle_slope_to_the_frame_nothing():
    value_HWC = np.full((12, 12, 3), 50, np.uint8)
    value_HWC[4:8, 4:8] = (80, 50, 20)
    distance_HW = barrier_distance(value_HWC, 3)
    assert (distance_HW[4:8, 4:8] == 60).all()
    assert distance_HW.sum() == 16 * 60
    columns_HWC = np.repeat(np.arange(12, dtype=np.uint8)[None, :, None] * 9, 12, 0)
    assert barrier_distance(columns_HWC, 3).max() == 0  # every pixel reaches the frame along its own column


def test_figures_stand_out_from_the_ground(scene):
    saliency_HW = Saliency(stride=1).map(ImageViews(scene))[:, :, 0]
    figure_HW = np.zeros(scene.shape[:2], bool)
    figure_HW[20:41, 30:51] = True
    figure_HW[24:52, 64:71] = True
    frame_HW = np.ones(scene.shape[:2], bool)
    frame_HW[8:-8, 8:-8] = False
    assert saliency_HW[figure_HW].mean() > 0.5
    assert saliency_HW[frame_HW].mean() < 0.1


def test_large_images_are_taken_small_and_give_nearly_the_same_map(scene):
    large_HWC = scene.repeat(4, 0).repeat(4, 1)
    small_HW, large_HW = Saliency(stride=4).map(ImageViews(scene)), Saliency(stride=16).map(ImageViews(large_HWC))
    assert small_HW.shape == large_HW.shape
    assert np.corrcoef(small_HW.ravel(), large_HW.ravel())[0, 1] > 0.97


@pytest.mark.parametrize("value", [0, 255])
def test_an_even_image_has_no_figure(value):
    saliency_HWC = Saliency().map(ImageViews(np.full((32, 32, 3), value, np.uint8)))
    assert np.isfinite(saliency_HWC).all()
    assert np.ptp(saliency_HWC) == 0
