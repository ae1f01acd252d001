import numpy as np
import pytest
import torch

from dpkd.objectives.hog import hog
from dpkd.priors.base import ImageViews
from dpkd.priors.catalogue.orientation import Hog


def drawn(*, height: int, width: int, count: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (60, 84), (8, 8), (5, 40)])
def test_maps_made_on_the_device_are_those_that_prepare_stores(height, width):
    image_BHWC = drawn(height=height, width=width)
    map_BKHW = hog(torch.from_numpy(image_BHWC).permute(0, 3, 1, 2))
    stored = np.stack([Hog().map(ImageViews(image_HWC)).transpose(2, 0, 1) for image_HWC in image_BHWC])
    np.testing.assert_allclose(map_BKHW.numpy(), stored, atol=2e-3)


def by_definition(image_HWC: np.ndarray, *, bins: int = 9, cell: int = 8) -> np.ndarray:
    """Dalal and Triggs in float64, pixel by pixel, for cells that divide the image; HWK."""
    padded = np.pad(image_HWC.astype(np.float64), ((1, 1), (1, 1), (0, 0)), mode="reflect")
    height, width, _ = image_HWC.shape
    histogram = np.zeros((height // cell, width // cell, bins))
    for y in range(height):
        for x in range(width):
            dx, dy = padded[y + 1, x + 2] - padded[y + 1, x], padded[y + 2, x + 1] - padded[y, x + 1]
            colour = np.argmax(dx**2 + dy**2)
            angle = np.degrees(np.arctan2(dy[colour], dx[colour])) % 180
            for k in range(bins):
                distance = abs(angle - (k + 0.5) * 180 / bins)
                share = max(0.0, 1 - min(distance, 180 - distance) * bins / 180)
                histogram[y // cell, x // cell, k] += share * np.hypot(dx[colour], dy[colour]) / cell**2
    return histogram / np.sqrt((histogram**2).sum(2, keepdims=True) + 1e-10)


@pytest.mark.parametrize(("height", "width"), [(32, 48), (8, 16)])
def test_the_maps_are_those_of_the_definition(height, width):
    image_BHWC = drawn(height=height, width=width)
    map_BKHW = hog(torch.from_numpy(image_BHWC).permute(0, 3, 1, 2))
    expected = np.stack([by_definition(image_HWC).transpose(2, 0, 1) for image_HWC in image_BHWC])
    np.testing.assert_allclose(map_BKHW.numpy(), expected, atol=1e-5)


def test_many_large_images_have_the_maps_of_each_alone():
    image_BCHW = torch.from_numpy(drawn(height=200, width=208, count=4)).permute(0, 3, 1, 2)
    assert torch.equal(hog(image_BCHW), torch.cat([hog(image_1CHW) for image_1CHW in image_BCHW.split(1)]))


def test_bins_and_cells_can_be_chosen():
    image_BHWC = drawn(height=32, width=48, count=1)
    map_BKHW = hog(torch.from_numpy(image_BHWC).permute(0, 3, 1, 2), bins=6, cell=16)
    stored = Hog(bins=6, cell=16).map(ImageViews(image_BHWC[0])).transpose(2, 0, 1)
    np.testing.assert_allclose(map_BKHW[0].numpy(), stored, atol=2e-3)


def test_a_mirrored_view_has_the_bins_reversed():
    image_BCHW = torch.from_numpy(drawn(height=32, width=32)).permute(0, 3, 1, 2)
    torch.testing.assert_close(hog(image_BCHW.flip(3)), hog(image_BCHW).flip(1, 3), atol=1e-4, rtol=0)


def test_a_flat_view_has_no_direction():
    assert torch.equal(hog(torch.full((1, 3, 16, 16), 77, dtype=torch.uint8)), torch.zeros(1, 9, 2, 2))
