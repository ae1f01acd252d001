"""Gradients, their tensors, lines through them and crests, pixel by pixel; loads numba."""

import cv2
import numpy as np
import numpy.typing as npt
from numba import njit

Image = npt.NDArray[np.float32]

TINY = np.float32(1e-12)
"""Keeps the direction of nothing finite."""


def gradients(planes_CHW: Image, *, scale: float) -> Image:
    """`scale` times the central differences of C planes, HW2C: x and y of each plane, 0 across the frame."""
    return np.asarray(_gradients(planes_CHW, np.float32(0.5 * scale)))


def tensor(gradient_HWC: Image) -> Image:
    """The structure tensor (Di Zenzo 1986) of `gradients`, 3HW: xx, yy, xy, summed over the planes."""
    return np.asarray(_tensor(gradient_HWC))


def strengths(tensor_3HW: Image) -> tuple[Image, Image]:
    """Square roots of the tensor's larger and smaller eigenvalue, HW each."""
    larger_HW, smaller_HW = _strengths(tensor_3HW)
    return larger_HW, smaller_HW


def coherent(tensor_3HW: Image) -> Image:
    """Square root of the difference of the tensor's eigenvalues, HW: the energy that has a direction."""
    return np.sqrt(cv2.magnitude(tensor_3HW[0] - tensor_3HW[1], 2 * tensor_3HW[2]))


def line_strength(gradient_HW6: Image, tensor_3HW: Image, *, weight_K: Image, step: float) -> Image:
    """The gradient along a straight line through each pixel, HW; of three planes.

    The line runs along the tensor's smaller eigenvector. Of the gradients at `step` times 0, ±1, ..., ±(K - 1) pixels
    along it the part across the line is averaged with `weight_K`, plane by plane, so that opposite steps, as texture
    has them, cancel; the root of the sum of squares over the planes is given.
    """
    return np.asarray(_line_strength(gradient_HW6, tensor_3HW, weight_K, np.float32(step)))


def crests(map_HW: Image, *, direction_px: float, fine_px: float, least: float = 0.0) -> Image:
    """The map, smoothed by `fine_px`, where it is at least `least` and a crest, 0 elsewhere.

    A pixel is on a crest if the map is no larger one pixel to either side of it.

    The direction across a crest is that of the strongest downward curvature of the map smoothed by `direction_px`.
    """
    smooth_HW = cv2.GaussianBlur(map_HW, (0, 0), direction_px)
    second, flat, first = np.array([1.0, -2.0, 1.0]), np.array([1.0]), np.array([-0.5, 0.0, 0.5])
    xx_HW, yy_HW = cv2.sepFilter2D(smooth_HW, -1, second, flat), cv2.sepFilter2D(smooth_HW, -1, flat, second)
    xy_HW = cv2.sepFilter2D(smooth_HW, -1, first, first)
    fine_HW = cv2.GaussianBlur(map_HW, (0, 0), fine_px)
    return np.asarray(_suppress(np.pad(fine_HW, 1, mode="edge"), yy_HW - xx_HW, -2 * xy_HW, np.float32(least)))


@njit(cache=True, error_model="numpy")
def _gradients(planes_CHW, factor):  # type: ignore[no-untyped-def]
    channels, height, width = planes_CHW.shape
    gradient_HWC = np.zeros((height, width, 2 * channels), np.float32)
    for c in range(channels):
        for y in range(height):
            for x in range(1, width - 1):
                gradient_HWC[y, x, 2 * c] = factor * (planes_CHW[c, y, x + 1] - planes_CHW[c, y, x - 1])
        for y in range(1, height - 1):
            for x in range(width):
                gradient_HWC[y, x, 2 * c + 1] = factor * (planes_CHW[c, y + 1, x] - planes_CHW[c, y - 1, x])
    return gradient_HWC


@njit(cache=True, error_model="numpy")
def _tensor(gradient_HWC):  # type: ignore[no-untyped-def]
    height, width, channels = gradient_HWC.shape
    tensor_3HW = np.empty((3, height, width), np.float32)
    for y in range(height):
        for x in range(width):
            xx, yy, xy = np.float32(0), np.float32(0), np.float32(0)
            for c in range(0, channels, 2):
                dx, dy = gradient_HWC[y, x, c], gradient_HWC[y, x, c + 1]
                xx += dx * dx
                yy += dy * dy
                xy += dx * dy
            tensor_3HW[0, y, x], tensor_3HW[1, y, x], tensor_3HW[2, y, x] = xx, yy, xy
    return tensor_3HW


@njit(cache=True, error_model="numpy")
def _strengths(tensor_3HW):  # type: ignore[no-untyped-def]
    larger_HW, smaller_HW = np.empty_like(tensor_3HW[0]), np.empty_like(tensor_3HW[0])
    half = np.float32(0.5)
    for y in range(larger_HW.shape[0]):
        for x in range(larger_HW.shape[1]):
            xx, yy, twice = tensor_3HW[0, y, x], tensor_3HW[1, y, x], tensor_3HW[2, y, x] + tensor_3HW[2, y, x]
            root = np.sqrt((xx - yy) * (xx - yy) + twice * twice)
            larger_HW[y, x] = np.sqrt(half * (xx + yy + root))
            smaller_HW[y, x] = np.sqrt(half * max(xx + yy - root, np.float32(0)))
    return larger_HW, smaller_HW


@njit(cache=True, error_model="numpy")
def _unit(double_x, double_y):  # type: ignore[no-untyped-def]
    """The unit vector at half the angle of a vector."""
    half = np.float32(0.5)
    cosine = half * double_x / (np.sqrt(double_x * double_x + double_y * double_y) + TINY)
    x, y = np.sqrt(max(half + cosine, np.float32(0))), np.sqrt(max(half - cosine, np.float32(0)))
    return x, (-y if double_y < 0 else y)


@njit(cache=True, error_model="numpy")
def _within(place, size):  # type: ignore[no-untyped-def]
    """A place on an axis, mirrored once at its ends, and in any case on it."""
    mirrored = min(abs(place), 2 * (size - 1) - abs(place))
    return min(max(mirrored, 0), size - 1)


@njit(cache=True, error_model="numpy")
def _line_strength(gradient_HW6, tensor_3HW, weight_K, step):  # type: ignore[no-untyped-def]
    height, width = gradient_HW6.shape[:2]
    strength_HW, share = np.empty((height, width), np.float32), np.float32(1 / (2 * weight_K.sum() - weight_K[0]))
    reach = int(np.ceil(step * np.float32(len(weight_K) - 1))) + 1
    for y in range(height):
        for x in range(width):
            twice = tensor_3HW[2, y, x] + tensor_3HW[2, y, x]
            across_x, across_y = _unit(tensor_3HW[0, y, x] - tensor_3HW[1, y, x], twice)
            inside = reach <= y < height - reach and reach <= x < width - reach
            part_x, part_y = weight_K[0] * across_x, weight_K[0] * across_y
            first = part_x * gradient_HW6[y, x, 0] + part_y * gradient_HW6[y, x, 1]
            second = part_x * gradient_HW6[y, x, 2] + part_y * gradient_HW6[y, x, 3]
            third = part_x * gradient_HW6[y, x, 4] + part_y * gradient_HW6[y, x, 5]
            for k in range(1, len(weight_K)):
                along = step * np.float32(k)
                down, left = int(np.rint(along * across_x)), int(np.rint(along * across_y))
                at_y, at_x, to_y, to_x = y + down, x - left, y - down, x + left
                if not inside:
                    at_y, at_x = _within(at_y, height), _within(at_x, width)
                    to_y, to_x = _within(to_y, height), _within(to_x, width)
                at, to = gradient_HW6[at_y, at_x], gradient_HW6[to_y, to_x]
                part_x, part_y = weight_K[k] * across_x, weight_K[k] * across_y
                first += part_x * (at[0] + to[0]) + part_y * (at[1] + to[1])
                second += part_x * (at[2] + to[2]) + part_y * (at[3] + to[3])
                third += part_x * (at[4] + to[4]) + part_y * (at[5] + to[5])
            strength_HW[y, x] = share * np.sqrt(first * first + second * second + third * third)
    return strength_HW


@njit(cache=True, error_model="numpy")
def _suppress(padded_HW, double_x_HW, double_y_HW, least):  # type: ignore[no-untyped-def]
    """The map within its padding, 0 below `least` and where it is larger to a side along half the angle of `double`."""
    height, width = double_x_HW.shape
    kept_HW = np.zeros((height, width), np.float32)
    for y in range(height):
        for x in range(width):
            value = padded_HW[y + 1, x + 1]
            if value < least:
                continue
            across_x, across_y = _unit(double_x_HW[y, x], double_y_HW[y, x])
            largest = True
            for sign in (1, -1):
                at_x, at_y = x + 1 + sign * across_x, y + 1 + sign * across_y
                left, top = min(int(at_x), width), min(int(at_y), height)
                share_x, share_y = at_x - left, at_y - top
                upper = padded_HW[top, left] * (1 - share_x) + padded_HW[top, left + 1] * share_x
                lower = padded_HW[top + 1, left] * (1 - share_x) + padded_HW[top + 1, left + 1] * share_x
                if upper * (1 - share_y) + lower * share_y > value:
                    largest = False
            if largest:
                kept_HW[y, x] = value
    return kept_HW
