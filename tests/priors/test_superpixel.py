from bisect import bisect_left

import numpy as np
import pytest
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dpkd.priors.base import ImageViews
from dpkd.priors.catalogue.regions import Superpixel, merged_regions, neighbours


def components(links, count):
    first, second = np.array(links, np.int64).reshape(-1, 2).T
    return connected_components(coo_array((np.ones(len(links)), (first, second)), (count, count)), directed=False)


def reference_labels(colour_HWC, num_regions):
    """The rounds of Borůvka with Ward's loss, plus 1 to the squared distance, in float64."""
    cell_HW, colour_NC = np.arange(colour_HWC[:, :, 0].size).reshape(colour_HWC.shape[:2]), colour_HWC.reshape(-1, 3)
    sides = (cell_HW[:, :-1], cell_HW[:, 1:]), (cell_HW[:-1], cell_HW[1:])
    pairs = [pair for first_HW, second_HW in sides for pair in zip(first_HW.ravel(), second_HW.ravel(), strict=True)]
    label_N, count = cell_HW.ravel(), cell_HW.size
    while count > num_regions:
        mean_R = [colour_NC[label_N == r].mean(0) for r in range(count)]
        size_R, least = np.bincount(label_N), {}
        for i, j in {(label_N[i], label_N[j]) for i, j in pairs if label_N[i] != label_N[j]}:
            loss = (((mean_R[i] - mean_R[j]) ** 2).sum() + 1) * size_R[i] * size_R[j] / (size_R[i] + size_R[j])
            for r, other in ((i, j), (j, i)):
                least[r] = min(least.get(r, (np.inf, 0, 0)), (loss, r, other))
        links = [(r, other) for _, r, other in sorted(least.values())]
        end = bisect_left(range(count), -num_regions, key=lambda k: -components(links[:k], count)[0])
        count, label_R = components(links[:end], count)
        label_N = label_R[label_N]
    return label_N.reshape(cell_HW.shape)


@pytest.mark.parametrize("num_regions", [1, 7, 40, 200])
def test_regions_are_those_of_a_plain_reference(num_regions):
    smooth_HWC = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(20, 24, 3)), (2, 2, 0))
    colour_HWC = (60 * smooth_HWC).astype(np.float32)
    found_N = merged_regions(colour_HWC.reshape(-1, 3), *neighbours(20, 24), num_regions)
    expected_N = reference_labels(colour_HWC.astype(np.float64), num_regions).ravel()
    assert len(np.unique(found_N)) == len(np.unique(expected_N)) == num_regions
    assert len(set(zip(found_N.tolist(), expected_N.tolist(), strict=True))) == num_regions


@pytest.mark.parametrize("stride", [1, 4])
def test_labels_count_from_zero_to_the_number_asked_for_and_each_region_is_connected(scene, stride):
    label_HW = Superpixel(stride=stride).map(ImageViews(scene))[:, :, 0]
    assert np.unique(label_HW).tolist() == list(range(24))  # 96 x 64 / 16²
    assert [ndimage.label(label_HW == label)[1] for label in range(24)] == [1] * 24


def test_regions_keep_to_one_side_of_a_strong_edge(scene):
    image_HWC = scene // 8
    image_HWC[:, 50:] += 180
    label_HW = Superpixel(stride=1).map(ImageViews(image_HWC))[:, :, 0]
    assert not set(label_HW[:, :50].ravel()) & set(label_HW[:, 50:].ravel())


def test_an_even_image_has_square_regions():
    label_HW = Superpixel().map(ImageViews(np.full((128, 64, 3), 90, np.uint8)))[:, :, 0]
    np.testing.assert_array_equal(label_HW, np.arange(32).reshape(8, 4).repeat(4, 0).repeat(4, 1))


def test_an_image_too_small_for_two_regions_is_one_region():
    assert Superpixel().map(ImageViews(np.random.default_rng(0).integers(0, 256, (12, 9, 3), np.uint8))).max() == 0
