"""Background replacement: figures keep their pixels, grounds come from the previous image of the view."""

import numpy as np
import pytest

from dpkd.data.augment import replace_backgrounds
from dpkd.data.settings import BackgroundSettings

RNG = np.random.default_rng(0)
ALL = BackgroundSettings(share=1.0)
INDEX = np.arange(4)


def replaced(image_BCHW, map_B1hw, *, settings=ALL, epoch=0, index_B=INDEX):
    epoch_B = np.full_like(index_B, epoch)
    return replace_backgrounds(image_BCHW, map_B1hw, settings=settings, seed=0, index_B=index_B, epoch_B=epoch_B)


def images(count: int = 4) -> np.ndarray:
    return RNG.integers(0, 256, (count, 3, 8, 8), np.uint8)


def figures(count: int = 4) -> np.ndarray:
    """The left half is figure."""
    map_B1hw = np.zeros((count, 1, 8, 8), np.float32)
    map_B1hw[..., :4] = 1
    return map_B1hw


def test_the_figure_stays_and_the_ground_is_that_of_the_previous_image():
    image_BCHW = images()
    result_BCHW = replaced(image_BCHW, figures())
    np.testing.assert_array_equal(result_BCHW[..., :4], image_BCHW[..., :4])
    np.testing.assert_array_equal(result_BCHW[..., 4:], np.roll(image_BCHW, 1, axis=0)[..., 4:])


def test_a_partial_figure_is_blended_by_the_map_with_more_contrast():
    image_BCHW, map_B1hw = images(2), np.full((2, 1, 4, 4), 0.5, np.float32)
    result_BCHW = replaced(image_BCHW, map_B1hw, index_B=np.arange(2))
    blend_BCHW = 0.65 * image_BCHW + 0.35 * image_BCHW[::-1]
    assert np.abs(result_BCHW - blend_BCHW).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("value", [0.0, 0.02, np.nan])
def test_an_image_without_a_known_figure_stays_as_it_is(value):
    image_BCHW, map_B1hw = images(), figures()
    map_B1hw[1] = value
    result_BCHW = replaced(image_BCHW, map_B1hw)
    np.testing.assert_array_equal(result_BCHW[1], image_BCHW[1])
    np.testing.assert_array_equal(result_BCHW[2, :, :, 4:], image_BCHW[1, :, :, 4:])


def test_several_views_of_an_image_take_grounds_of_their_own_view():
    image_BCHW, map_B1hw = images(8), figures(8)
    result_BCHW = replaced(image_BCHW, map_B1hw)
    np.testing.assert_array_equal(result_BCHW[4, :, :, 4:], image_BCHW[7, :, :, 4:])
    np.testing.assert_array_equal(result_BCHW[0, :, :, 4:], image_BCHW[3, :, :, 4:])


def test_images_are_chosen_by_seed_epoch_and_sample_at_the_given_share():
    index_B = np.arange(1000)
    image_BCHW, map_B1hw = images(1000), figures(1000)
    settings = BackgroundSettings(share=0.3)

    def chosen(epoch):
        result_BCHW = replaced(image_BCHW, map_B1hw, settings=settings, epoch=epoch, index_B=index_B)
        return (result_BCHW != image_BCHW).any((1, 2, 3))

    assert 0.25 < chosen(0).mean() < 0.35
    np.testing.assert_array_equal(chosen(0), chosen(0))
    assert (chosen(0) != chosen(1)).mean() > 0.3


def test_the_control_cuts_by_the_map_of_another_image():
    image_BCHW, map_B1hw = images(), figures()
    map_B1hw[0] = 1.0
    result_BCHW = replaced(image_BCHW, map_B1hw, settings=BackgroundSettings(share=1.0, control="shuffle"))
    np.testing.assert_array_equal(result_BCHW[1], image_BCHW[1])
    np.testing.assert_array_equal(result_BCHW[0, :, :, 4:], image_BCHW[3, :, :, 4:])
