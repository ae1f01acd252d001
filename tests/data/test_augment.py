"""Random views, and that maps follow their image through them. References: Pillow's resampling, colours in float64."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from dpkd.data.augment import GREY, Crop, apply_image, apply_map, centre_view, normalise, random_views
from dpkd.data.settings import AugmentSettings
from dpkd.rng import Purpose, bits

SIZES = st.tuples(st.integers(16, 90), st.integers(16, 90))
SAMPLES = st.fixed_dictionaries(
    {"seed": st.integers(0, 2**40), "epoch": st.integers(0, 1000), "index": st.integers(0, 2**40)}
)


def _mirror(map_HWC):
    return map_HWC[:, ::-1]


def _plain(view: Crop) -> Crop:
    return replace(view, brightness=1.0, contrast=1.0, saturation=1.0)


def _smooth_image(height: int, width: int) -> np.ndarray:
    """Slow waves, without symmetry, so that two ways of resampling agree closely."""
    y, x = np.mgrid[:height, :width] / 30
    waves = np.stack([np.sin(x + 0.3 * y), np.cos(1.3 * y - x / 2), np.sin(0.7 * x * y / 3)], axis=-1)
    return np.round(127.5 + 100 * waves).astype(np.uint8)


@settings(max_examples=150, deadline=None)
@given(SIZES, SAMPLES, st.floats(0.05, 1), st.floats(0.4, 1))
def test_a_view_lies_within_its_image_and_its_settings(image_size, sample, smallest, narrowest):
    view_settings = AugmentSettings(crop_scale=(smallest, 1), crop_ratio=(narrowest, 1 / narrowest))
    view = random_views([view_settings], image_size, **sample)[0]
    assert 0 <= view.top <= image_size[0] - view.height
    assert 0 <= view.left <= image_size[1] - view.width
    assert view.height >= 1
    assert view.width >= 1
    for factor in (view.brightness, view.contrast, view.saturation):
        assert 0.6 <= factor <= 1.4
    assert view == random_views([view_settings], image_size, **sample)[0]


def test_views_are_spread_as_those_of_torchvision():
    torch.manual_seed(0)
    chosen = AugmentSettings()
    views = [random_views([chosen], (60, 84), seed=3, epoch=0, index=i)[0] for i in range(3000)]
    image = torch.zeros(3, 60, 84)
    boxes = [RandomResizedCrop.get_params(image, list(chosen.crop_scale), list(chosen.crop_ratio)) for _ in range(3000)]
    found = np.array([(view.top, view.left, view.height, view.width) for view in views])
    expected = np.array(boxes)
    np.testing.assert_allclose(found.mean(0), expected.mean(0), atol=0.8)
    np.testing.assert_allclose(found.std(0), expected.std(0), atol=0.5)
    assert abs(np.mean([view.flip for view in views]) - 0.5) < 0.03
    assert abs(np.mean([view.brightness for view in views]) - 1) < 0.02


def test_views_differ_between_samples_epochs_and_seeds():
    def view(seed: int, epoch: int, index: int) -> Crop:
        return random_views([AugmentSettings()], (84, 84), seed=seed, epoch=epoch, index=index)[0]

    assert len({view(0, 0, 0), view(1, 0, 0), view(0, 1, 0), view(0, 0, 1), view(0, 1, 1)}) == 5


def test_an_image_too_long_for_any_crop_gives_its_centre():
    view = random_views([AugmentSettings(crop_scale=(1, 1))], (20, 200), seed=0, epoch=0, index=0)[0]
    assert (view.height, view.width, view.top) == (20, 27, 0)


@given(SAMPLES, st.integers(1, 30))
def test_draws_are_those_of_a_generator_of_their_own(sample, count):
    place = (sample["epoch"], sample["index"])
    key, counter = np.array([sample["seed"], 4], np.uint64), np.array([0, 0, *place], np.uint64)
    expected = np.random.Philox(key=key, counter=counter).random_raw(count)
    found = bits(count, seed=sample["seed"], purpose=Purpose.VIEWS, place=place)
    np.testing.assert_array_equal(found, expected)


@settings(max_examples=60, deadline=None)
@given(SIZES, SAMPLES, st.integers(8, 40))
def test_a_map_that_is_the_image_follows_it(image_size, sample, size):
    image = _smooth_image(*image_size)
    view = _plain(random_views([AugmentSettings()], image_size, **sample)[0])
    seen = apply_image(view, image, size=size)
    mapped = apply_map(view, image.astype(np.float32), size=size, nearest=False, flip=_mirror)
    assert mapped.dtype == np.float32
    assert np.abs(seen - mapped).max() < 14  # filters differ; a shift by one pixel of the view differs by up to 60
    assert np.abs(seen - mapped).mean() < 2


@settings(max_examples=60, deadline=None)
@given(SIZES, SAMPLES, st.integers(4, 30), st.integers(4, 30))
def test_maps_are_resampled_as_pillow_does(image_size, sample, cells, size):
    map_HW = np.random.default_rng(0).random((cells, cells + 3), np.float32)
    view = random_views([AugmentSettings(flip=0)], image_size, **sample)[0]
    y, x = cells / image_size[0], (cells + 3) / image_size[1]
    box = (view.left * x, view.top * y, (view.left + view.width) * x, (view.top + view.height) * y)
    expected = Image.fromarray(map_HW).resize((size, size), Image.Resampling.BILINEAR, box=box)
    found = apply_map(view, map_HW[..., None], size=size, nearest=False, flip=_mirror)
    np.testing.assert_allclose(found[..., 0], np.asarray(expected), atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(SIZES, SAMPLES, st.integers(4, 30))
def test_labels_keep_their_values_and_their_place(image_size, sample, size):
    """Labels that number the pixels of the image tell which pixel each cell of the view shows."""
    height, width = image_size
    label_HW1 = np.arange(height * width, dtype=np.int32).reshape(height, width, 1)
    view = random_views([AugmentSettings()], image_size, **sample)[0]
    shown = apply_map(view, label_HW1, size=size, nearest=True, flip=_mirror)[..., 0].astype(int)
    columns = (np.arange(size) + 0.5) * view.width / size
    centre_x = view.left + (columns[::-1] if view.flip else columns)
    centre_y = view.top + (np.arange(size) + 0.5) * view.height / size
    # a centre that falls between two pixels may go to either: the order of the sums decides
    assert np.abs(shown % width + 0.5 - np.tile(centre_x, (size, 1))).max() <= 0.5 + 1e-9
    assert np.abs(shown // width + 0.5 - np.tile(centre_y[:, None], (1, size))).max() <= 0.5 + 1e-9


def test_a_flip_mirrors_image_and_map_and_asks_the_map_for_its_values():
    image = _smooth_image(40, 50)
    view = Crop(40, 50, top=5, left=8, height=24, width=30)
    mirrored = replace(view, flip=True)
    np.testing.assert_array_equal(apply_image(mirrored, image, size=16), apply_image(view, image, size=16)[:, ::-1])
    direction = np.random.default_rng(0).random((10, 12, 2), np.float32)

    def swap_directions(map_HWC):
        return map_HWC[:, ::-1, ::-1]

    straight = apply_map(view, direction, size=16, nearest=False, flip=swap_directions)
    turned = apply_map(mirrored, direction, size=16, nearest=False, flip=swap_directions)
    np.testing.assert_allclose(turned, straight[:, ::-1, ::-1], rtol=1e-5)


def _mean_of_samples(pixel_NX: np.ndarray, *, size: int) -> np.ndarray:
    """Along the first axis, in float64: pixels [size] as means of bilinear samples at most 1.5 pixels apart."""
    length = len(pixel_NX)
    num = size * max(1, int(np.ceil(length / size / 1.5)))
    place = np.clip((np.arange(num) + 0.5) * length / num - 0.5, 0, length - 1)
    low = np.floor(place).astype(int)
    share = (place - low).reshape(-1, *[1] * (pixel_NX.ndim - 1))
    sample_NX = (1 - share) * pixel_NX[low] + share * pixel_NX[np.minimum(low + 1, length - 1)]
    return sample_NX.reshape(size, -1, *pixel_NX.shape[1:]).mean(1)


@settings(max_examples=60, deadline=None)
@given(st.tuples(st.integers(16, 200), st.integers(16, 200)), SAMPLES, st.integers(8, 60))
def test_pixels_are_means_of_bilinear_samples(image_size, sample, size):
    image = np.random.default_rng(0).integers(0, 256, (*image_size, 3)).astype(np.uint8)
    view = _plain(random_views([AugmentSettings(flip=0)], image_size, **sample)[0])
    crop = image[view.top : view.top + view.height, view.left : view.left + view.width].astype(np.float64)
    expected = _mean_of_samples(_mean_of_samples(crop, size=size).swapaxes(0, 1), size=size).swapaxes(0, 1)
    assert np.abs(apply_image(view, image, size=size) - expected).max() <= 1.6  # rounded thrice


@pytest.mark.parametrize("factor", [1.1, 1.45, 1.7, 2, 2.9, 4.2])
def test_a_smaller_view_keeps_what_a_mean_over_the_area_keeps(factor):
    """Beside Pillow's Lanczos filter, of an image with details at every scale."""
    size, side = 48, round(48 * factor)
    rng = np.random.default_rng(0)
    layers = [cv2.resize(rng.random((side // 2**k + 1,) * 2 + (3,)), (side, side)) * 2**k for k in range(5)]
    image = np.clip(np.sum(layers, 0) * 8, 0, 255).astype(np.uint8)
    expected = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS)).astype(float)
    area = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
    found = apply_image(centre_view((side, side)), image, size=size)
    assert np.square(found - expected).mean() < 1.35 * np.square(area - expected).mean()


@pytest.mark.parametrize("image_size", [(64, 64), (48, 80), (81, 50)])
def test_the_centre_view_is_the_largest_centred_square(image_size):
    height, width = image_size
    side = min(image_size)
    image = _smooth_image(*image_size)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(image[top : top + side, left : left + side])
    expected = np.asarray(square.resize((24, 24), Image.Resampling.BOX)).astype(float)
    assert np.abs(apply_image(centre_view(image_size), image, size=24) - expected).max() < 4


def test_a_view_of_the_same_size_is_the_image_itself():
    image = _smooth_image(32, 32)
    np.testing.assert_array_equal(apply_image(centre_view((32, 32)), image, size=32), image)


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 2), st.floats(0, 2), st.floats(0, 2))
def test_colours_change_as_brightness_contrast_and_saturation_in_turn(brightness, contrast, saturation):
    image = np.random.default_rng(0).integers(0, 256, (20, 20, 3)).astype(np.uint8)
    view = replace(centre_view((20, 20)), brightness=brightness, contrast=contrast, saturation=saturation)
    expected = image.astype(np.float64) * brightness
    expected = contrast * expected + (1 - contrast) * (expected @ GREY).mean()
    expected = saturation * expected + (1 - saturation) * (expected @ GREY)[..., None]
    found = apply_image(view, image, size=20)
    assert np.abs(found - expected.clip(0, 255)).max() <= 1  # OpenCV calculates with 10 binary places


def test_colours_do_not_move_the_crop():
    plain, coloured = AugmentSettings(brightness=0, contrast=0, saturation=0), AugmentSettings()
    for index in range(20):
        view = random_views([coloured], (60, 70), seed=0, epoch=0, index=index)[0]
        assert random_views([plain], (60, 70), seed=0, epoch=0, index=index)[0] == _plain(view)


def test_normalised_images_have_the_given_mean_and_deviation_taken_away():
    image_BCHW = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    found = normalise(image_BCHW, mean=mean, std=std)
    expected = (image_BCHW.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)


def test_threads_of_opencv_change_nothing():
    image = _smooth_image(90, 70)
    view = random_views([AugmentSettings()], (90, 70), seed=0, epoch=0, index=0)[0]
    threads = cv2.getNumThreads()
    seen = []
    for count in (1, 2):
        cv2.setNumThreads(count)
        seen.append(apply_image(view, image, size=32))
    cv2.setNumThreads(threads)
    np.testing.assert_array_equal(seen[0], seen[1])


@given(SIZES, SAMPLES)
def test_the_first_of_several_views_is_the_one_alone_and_all_differ(image_size, sample):
    large, small = AugmentSettings(), AugmentSettings(crop_scale=(0.05, 0.3))
    views = random_views([large, large, small], image_size, **sample)
    assert views[:1] == random_views([large], image_size, **sample)
    assert views[:2] == random_views([large, large], image_size, **sample)
    assert len({(view.brightness, view.contrast, view.saturation) for view in views}) == 3
