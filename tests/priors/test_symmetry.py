import cv2
import numpy as np
import pytest

from dpkd.priors.catalogue.shape import Symmetry, radial_votes
from tests.priors.gratings import picture_of


def disc(radius: int, level: float) -> np.ndarray:
    grey_HW = np.full((96, 96), 127.0)
    cv2.circle(grey_HW, (40, 52), radius, level, -1, cv2.LINE_AA)
    return grey_HW


@pytest.mark.parametrize("level", [27, 227])
@pytest.mark.parametrize("radius", [8, 12])
def test_the_centre_of_a_disc_bright_or_dark_is_brightest(radius, level):
    map_HW = Symmetry(stride=4).map(picture_of(disc(radius, level)))[:, :, 0]
    y, x = np.unravel_index(map_HW.argmax(), map_HW.shape)
    assert abs(4 * y + 2 - 52) <= 4
    assert abs(4 * x + 2 - 40) <= 4


def test_a_disc_is_rounder_than_a_bar_of_the_same_contrast():
    bar_HW = np.full((96, 96), 127.0)
    bar_HW[:, 40:56] = 227
    assert Symmetry().map(picture_of(disc(8, 227))).max() > 1.5 * Symmetry().map(picture_of(bar_HW)).max()


def test_votes_are_those_of_the_definition():
    random = np.random.default_rng(0)
    dx_HW, dy_HW = (random.integers(-300, 300, (12, 15), np.int16) for _ in range(2))
    votes_HW, amounts_HW = np.zeros((12, 15)), np.zeros((12, 15))
    for y, x in np.ndindex(12, 15):
        slope = np.array([dx_HW[y, x], dy_HW[y, x]]) / 8
        length = np.linalg.norm(slope)
        if length < 4:
            continue
        step_x, step_y = np.rint(slope / length * 3).astype(int)
        for sign in (1, -1):
            if 0 <= y + sign * step_y < 12 and 0 <= x + sign * step_x < 15:
                votes_HW[y + sign * step_y, x + sign * step_x] += sign
                amounts_HW[y + sign * step_y, x + sign * step_x] += sign * length
    found_votes_HW, found_amounts_HW = radial_votes(dx_HW, dy_HW, 3)
    np.testing.assert_array_equal(found_votes_HW, votes_HW)
    np.testing.assert_allclose(found_amounts_HW, amounts_HW, rtol=1e-4, atol=1e-3)
