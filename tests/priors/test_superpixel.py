import numpy as np
from scipy import ndimage

from dpkd.priors.base import ImageViews
from dpkd.priors.catalogue.regions import Superpixel


def test_labels_count_from_zero_without_gaps_and_are_about_as_many_as_asked_for(scene):
    label_HW = Superpixel(stride=1).map(ImageViews(scene))[:, :, 0]
    labels = np.unique(label_HW)
    assert labels.tolist() == list(range(len(labels)))
    assert 0.6 * 24 <= len(labels) <= 1.4 * 24  # 96 x 64 / 16²


def test_regions_are_connected_and_keep_to_one_side_of_a_strong_edge(scene):
    image_HWC = scene // 8
    image_HWC[:, 50:] += 180
    label_HW = Superpixel(stride=1).map(ImageViews(image_HWC))[1:-1, 1:-1, 0]
    right_HW = np.zeros(label_HW.shape, bool)
    right_HW[:, 49:] = True
    parts = [ndimage.label(label_HW == label, np.ones((3, 3)))[1] for label in np.unique(label_HW)]
    assert np.mean(np.array(parts) == 1) > 0.9
    share = [right_HW[label_HW == label].mean() for label in np.unique(label_HW)]
    assert np.mean(np.minimum(share, 1 - np.array(share))) < 0.02


def test_the_coarse_map_is_the_fine_one_read_at_the_middle_of_each_cell(scene):
    fine_HW, coarse_HW = (Superpixel(stride=stride).map(ImageViews(scene))[:, :, 0] for stride in (1, 4))
    read_HW = fine_HW[2::4, 2::4]
    pairs = {(int(a), int(b)) for a, b in zip(read_HW.ravel(), coarse_HW.ravel(), strict=True)}
    assert len(pairs) == len(np.unique(read_HW)) == len(np.unique(coarse_HW))


def test_an_image_too_small_for_two_regions_is_one_region():
    assert Superpixel().map(ImageViews(np.random.default_rng(0).integers(0, 256, (12, 9, 3), np.uint8))).max() == 0
