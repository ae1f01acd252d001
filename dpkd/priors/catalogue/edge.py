"""Boundaries from several cues over four octaves, with weights fitted to human drawings.

Level 0 has a cell every 2 px; each higher level has half as many cells a side. Lengths are in cells of the level.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import cv2
import numpy as np
from pydantic import Field

from dpkd.priors.base import ImageViews, PriorConfig, grid_size, halved
from dpkd.priors.catalogue.kernels import Image, Kernel, cell_means
from dpkd.priors.codecs import NIBBLES, Codec, Map

Cues = dict[str, Image]

LEAST, SURE = 0.11, 0.22
"""Hysteresis of a crest: every cell has at least the first probability, and one cell has at least the second."""
PLANES = (np.float32(1), np.float32(3), np.float32(3))
"""Weights of L, a and b."""
FLOOR = np.float32(0.5)
"""Added to a cue before the logarithm: smaller cues are noise."""
LINE_WEIGHT_K = np.exp(-0.5 * (np.arange(3) * 3 / 4) ** 2).astype(np.float32)
"""Weights of every third cell along a line, up to 6 cells to each side: a Gaussian of 4."""
TINY = np.float32(1e-12)
"""Keeps the direction of a zero vector finite."""

BIAS = -2.151
WEIGHTS: tuple[dict[str, float], ...] = (
    {"step": 0.335, "light": 0.268, "line": 0.708, "mean": 0.803},
    {"cross": 0.346, "texture": 1.657, "around": -1.921},
    {"line": 0.3},
    {"cross": 0.212, "around": -1.485, "aligned": 1.368},
)
"""Weights of each level's cues, fitted by `tools/fit_edge.py`."""


class Edge(PriorConfig):
    """Probability that a person draws a boundary, one channel, a cell every `stride` pixels.

    logit P = b + Σ_k w_k ln(c_k + 1/2), a weighted product of cues c_k of the Lab image (`levels`). Gradients over
    scales, along lines and of texture increase P, as in Martin, Fowlkes & Malik 2004 (Pb); similar gradients in the
    surround decrease it. The weights are those of a logistic regression on the 100 images of BSDS500 val.
    """

    kind: Literal["edge"] = "edge"
    thin: bool = True
    """Keeps only crests, one cell wide, by hysteresis from 0.11 to 0.22: few bytes, and sharp after enlargement."""
    stride: int = Field(2, ge=1)

    version: ClassVar[int] = 3
    channels: ClassVar[int] = 1
    codec: ClassVar[Codec] = NIBBLES

    def map(self, image: ImageViews) -> Map:
        odds_HW, size = boundary_odds(image), grid_size(image, self.stride)
        if odds_HW.shape != size:
            finer = size[0] > odds_HW.shape[0] or size[1] > odds_HW.shape[1]
            odds_HW = enlarged(odds_HW, size, cubic=True) if finer else cell_means(odds_HW, size)[:, :, 0]
        probability_HW = np.asarray(1 / (1 + np.exp(-odds_HW)), np.float32)
        if self.thin:
            crest_HW = crests(probability_HW, direction_px=1.0, fine_px=0.5, least=LEAST)
            number, line_HW = cv2.connectedComponents((crest_HW > 0).astype(np.uint8), connectivity=8)
            sure_N = np.zeros(number, np.bool_)
            sure_N[line_HW[crest_HW >= SURE]] = True  # hysteresis (Canny 1986), over 8 neighbours
            probability_HW = np.where(sure_N[line_HW], crest_HW, np.float32(0))
        return np.asarray(probability_HW[:, :, None], np.float32)


def boundary_odds(image: ImageViews) -> Image:
    """Logarithm of the odds that a person draws a boundary, HW with a cell every 2 px.

    `BIAS` plus, for each cue c of each level, its weight times ln(c + `FLOOR`).
    """
    odds_HW = np.zeros((1, 1), np.float32)
    for cues, weights in zip(reversed(levels(image)), reversed(WEIGHTS), strict=True):
        odds_HW = enlarged(odds_HW, next(iter(cues.values())).shape)
        for name, weight in weights.items():
            odds_HW += np.float32(weight) * np.log(cues[name] + FLOOR)
    return odds_HW + np.float32(BIAS)


def levels(image: ImageViews) -> list[Cues]:
    """The cues of each level, finest level first.

    The planes are (L, 3a, 3b) of the image at half size after a Gaussian of one cell (0.8 at level 0); J is their
    structure tensor. `step` and `cross` are the roots of J's larger and smaller eigenvalue; `light` is the gradient of
    L; `mean` is the root mean square of the gradient over a Gaussian of 1; `line` is the gradient along a line
    (`line_strength`) in the direction of J over a Gaussian of 2. `texture` is the gradient of the contrast of luma in
    cells of level 0, over a Gaussian of 1.5. `around` and `aligned` are means of level 0's `step` and coherent energy
    over a wide Gaussian. Strong surroundings are evidence against a boundary (surround suppression, Grigorescu et al.
    2003), unless they are aligned.
    """
    grey_HW, unit = image.grey_HW, np.float32(100 / 255)
    variance_HW = halved(np.asarray(cv2.multiply(grey_HW, grey_HW))) - np.square(halved(grey_HW))
    contrast_HW = np.sqrt(np.sqrt(np.maximum(variance_HW, 0)) * unit + np.float32(0.25))

    planes = [plane_HW * weight for plane_HW, weight in zip(cv2.split(image.half_lab_HWC), PLANES, strict=True)]
    gradient_HWK, tensor_3HW, (step_HW, _, slope_HW) = structure(planes, 0.8)
    spread_3HW = _spread(tensor_3HW)
    aligned_HW = np.sqrt(cv2.magnitude(spread_3HW[0] - spread_3HW[1], 2 * spread_3HW[2]))
    first = {
        "step": step_HW,
        "light": slope_HW,
        "line": line_strength(gradient_HWK, spread_3HW),
        "mean": np.sqrt(_blurred(tensor_3HW[0] + tensor_3HW[1], 1)),
    }
    planes, around_HW = [halved(plane_HW) for plane_HW in planes], halved(step_HW)
    second = {
        "cross": structure(planes, 1.0)[2][1],
        "texture": structure([halved(contrast_HW)], 1.5)[2][2],
        "around": _blurred(around_HW, 4),
    }
    planes = [halved(plane_HW) for plane_HW in planes]
    gradient_HWK, tensor_3HW, _ = structure(planes, 1.0)
    third = {"line": line_strength(gradient_HWK, _spread(tensor_3HW))}
    planes = [halved(plane_HW) for plane_HW in planes]
    fourth = {
        "cross": structure(planes, 1.0)[2][1],
        "around": _blurred(halved(halved(around_HW)), 4),
        "aligned": _blurred(halved(halved(halved(aligned_HW))), 2),
    }
    return [first, second, third, fourth]


def enlarged(map_HW: Image, size: tuple[int, ...], *, cubic: bool = False) -> Image:
    """The map interpolated to a grid of height x width."""
    interpolation = cv2.INTER_CUBIC if cubic else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(map_HW, size[::-1], interpolation=interpolation), np.float32)


def _spread(tensor_3HW: Image) -> Image:
    return np.stack([_blurred(part_HW, 2) for part_HW in tensor_3HW])


def _blurred(map_HW: Image, scale: float) -> Image:
    """The map after a Gaussian, cut at three deviations."""
    side = 2 * int(np.ceil(3 * scale)) + 1
    return np.asarray(cv2.GaussianBlur(map_HW, (side, side), scale), np.float32)


def crests(map_HW: Image, *, direction_px: float, fine_px: float, least: float = 0.0) -> Image:
    """The map, smoothed by `fine_px`, at crests of at least `least`, and 0 elsewhere.

    A pixel is on a crest if the map is not larger one pixel to either side. The direction across a crest is the
    direction of the strongest downward curvature of the map smoothed by `direction_px`.
    """
    smooth_HW, fine_HW = _blurred(map_HW, direction_px), _blurred(map_HW, fine_px)
    bordered_HW = cv2.copyMakeBorder(smooth_HW, 1, 1, 1, 1, cv2.BORDER_REFLECT_101)
    return np.asarray(_suppress(np.pad(fine_HW, 1, mode="edge"), bordered_HW, np.float32(least)))


def structure(planes: Sequence[Image], scale: float) -> tuple[Image, Image, Image]:
    """Gradients of the planes at a scale (HW, x and y of each plane), their structure tensor, and its strengths.

    The gradients are central differences times the scale (γ-normalised, Lindeberg 1998), 0 at the border; the tensor
    (Di Zenzo 1986), 3HW, is xx, yy, xy, summed over the planes; the strengths, 3HW, are the roots of its larger and
    smaller eigenvalue, and the length of the gradient of the first plane.
    """
    plane_CHW = np.stack([_blurred(plane_HW, scale) for plane_HW in planes])
    gradient_HWK, tensor_3HW, strength_3HW = _structure(plane_CHW, np.float32(0.5 * scale))
    return gradient_HWK, tensor_3HW, strength_3HW


@Kernel
def _structure(plane_CHW, factor):  # type: ignore[no-untyped-def]
    num_planes, height, width = plane_CHW.shape
    gradient_HWK = np.zeros((height, width, 2 * num_planes), np.float32)
    tensor_3HW, strength_3HW = np.zeros((3, height, width), np.float32), np.zeros((3, height, width), np.float32)
    x_W, y_W = np.zeros(width, np.float32), np.zeros(width, np.float32)
    for y in range(height):
        xx_W, yy_W, xy_W = tensor_3HW[0, y], tensor_3HW[1, y], tensor_3HW[2, y]
        larger_W, smaller_W, length_W = strength_3HW[0, y], strength_3HW[1, y], strength_3HW[2, y]
        for c in range(num_planes):
            above_W, level_W = plane_CHW[c, max(y - 1, 0)], plane_CHW[c, y]
            below_W = plane_CHW[c, y + 1] if 0 < y < height - 1 else above_W
            for x in range(1, width - 1):
                x_W[x] = factor * (level_W[x + 1] - level_W[x - 1])
            for x in range(width):
                y_W[x] = factor * (below_W[x] - above_W[x])
                xx_W[x] += x_W[x] * x_W[x]
                yy_W[x] += y_W[x] * y_W[x]
                xy_W[x] += x_W[x] * y_W[x]
            for x in range(width):
                gradient_HWK[y, x, 2 * c], gradient_HWK[y, x, 2 * c + 1] = x_W[x], y_W[x]
            if c == 0:
                length_W[:] = np.sqrt(xx_W + yy_W)
        for x in range(width):
            across, twice = xx_W[x] - yy_W[x], xy_W[x] + xy_W[x]
            total, root = xx_W[x] + yy_W[x], np.sqrt(across * across + twice * twice)
            larger_W[x] = np.sqrt((total + root) * np.float32(0.5))
            smaller_W[x] = np.sqrt(max(total - root, np.float32(0)) * np.float32(0.5))
    return gradient_HWK, tensor_3HW, strength_3HW


def line_strength(
    gradient_HW6: Image, tensor_3HW: Image, *, weight_K: Image = LINE_WEIGHT_K, step: float = 3.0
) -> Image:
    """The gradient of three planes across a straight line through each pixel, HW.

    The line follows the eigenvector of the tensor's smaller eigenvalue. The gradients at `step` times 0, ±1, ...,
    ±(K - 1) pixels along the line are projected across it and averaged with `weight_K` for each plane, so that opposite
    steps, as in texture, cancel. The result is the root of the sum of squares over the planes.
    """
    return np.asarray(_along_lines(gradient_HW6, tensor_3HW, weight_K, step))


@Kernel
def _along_lines(gradient_HW6, tensor_3HW, weight_K, step):  # type: ignore[no-untyped-def]
    height, width = gradient_HW6.shape[:2]
    strength_HW, share = np.empty((height, width), np.float32), np.float32(1 / (2 * weight_K.sum() - weight_K[0]))
    reach = int(np.ceil(np.float32(step) * np.float32(len(weight_K) - 1))) + 1
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
                along = np.float32(step) * np.float32(k)
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


@Kernel
def _unit(double_x, double_y):  # type: ignore[no-untyped-def]
    """The unit vector at half the angle of a vector."""
    half = np.float32(0.5)
    cosine = half * double_x / (np.sqrt(double_x * double_x + double_y * double_y) + TINY)
    x, y = np.sqrt(max(half + cosine, np.float32(0))), np.sqrt(max(half - cosine, np.float32(0)))
    return x, (-y if double_y < 0 else y)


@Kernel
def _within(position, size):  # type: ignore[no-untyped-def]
    """A position on an axis, mirrored once at the ends, then clipped to the axis."""
    mirrored = min(abs(position), 2 * (size - 1) - abs(position))
    return min(max(mirrored, 0), size - 1)


@Kernel
def _suppress(padded_HW, smooth_HW, least):  # type: ignore[no-untyped-def]
    """The map without padding; 0 below `least`, or if it is larger on a side along the strongest downward curvature."""
    height, width = padded_HW.shape[0] - 2, padded_HW.shape[1] - 2
    kept_HW = np.zeros((height, width), np.float32)
    for y in range(1, height + 1):
        for x in range(1, width + 1):
            value = padded_HW[y, x]
            if value < least:
                continue
            # yy - xx and -2 xy, with the second differences xx, yy and xy
            vertical = smooth_HW[y - 1, x] + smooth_HW[y + 1, x] - smooth_HW[y, x - 1] - smooth_HW[y, x + 1]
            slant = (
                smooth_HW[y - 1, x + 1] + smooth_HW[y + 1, x - 1] - smooth_HW[y - 1, x - 1] - smooth_HW[y + 1, x + 1]
            )
            across_x, across_y = _unit(vertical, np.float32(0.5) * slant)
            largest = True
            for sign in (1, -1):
                at_x, at_y = x + sign * across_x, y + sign * across_y
                left, top = min(int(at_x), width), min(int(at_y), height)
                share_x, share_y = at_x - left, at_y - top
                upper = padded_HW[top, left] * (1 - share_x) + padded_HW[top, left + 1] * share_x
                lower = padded_HW[top + 1, left] * (1 - share_x) + padded_HW[top + 1, left + 1] * share_x
                if upper * (1 - share_y) + lower * share_y > value:
                    largest = False
            if largest:
                kept_HW[y - 1, x - 1] = value
    return kept_HW
