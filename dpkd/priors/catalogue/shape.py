"""Shapes: thin lines such as vessels, cracks and wires, and the centres of round objects."""

from typing import ClassVar, Literal

import cv2
import numpy as np
from pydantic import Field

from dpkd.priors.base import ImageViews, PriorConfig, grid_size
from dpkd.priors.catalogue.kernels import Kernel, cell_means
from dpkd.priors.codecs import Codec, JpegCodec, Map

FULL_SCALE = 48.0
"""Ridge strength, in grey levels, that is stored as 1."""
WEAKEST = 4.0
"""Gradient, in grey levels a pixel, below which a pixel does not vote for a centre."""


class Ridge(PriorConfig):
    """Strength of bright and of dark lines in a cell every `stride` pixels: two channels in [0, 1].

    With λ₁ ≤ λ₂ the eigenvalues of the Hessian of luma at scale s: bright R = max over s of s²·max(-λ₁, 0), dark
    R = max over s of s²·max(λ₂, 0) (Lindeberg 1998, γ = 1; only the larger eigenvalue, as in Frangi et al. 1998 for
    long thin shapes). The map is √min(R/48, 1), R averaged over the cell. Scales from 2 are computed at half size, and
    compared there with those below if cells are larger than a pixel.
    """

    kind: Literal["ridge"] = "ridge"
    scales: tuple[float, ...] = Field((1.0, 2.0, 3.0), min_length=1)
    """Standard deviations of the Gaussians, in pixels: about half the width of the lines."""
    stride: int = Field(8, ge=1)

    version: ClassVar[int] = 2
    channels: ClassVar[int] = 2
    codec: ClassVar[Codec] = JpegCodec()

    def map(self, image: ImageViews) -> Map:
        height, width = image.size
        fine_HW = image.grey_HW
        half_HW = np.asarray(cv2.resize(fine_HW, ((width + 1) // 2, (height + 1) // 2), interpolation=cv2.INTER_AREA))
        fine_2HW, half_2HW = np.zeros((2, *fine_HW.shape), np.float32), np.zeros((2, *half_HW.shape), np.float32)
        for scale in self.scales:
            if scale < 2:
                _add_ridges(np.asarray(cv2.GaussianBlur(fine_HW, (0, 0), scale)), scale, fine_2HW)
            else:
                _add_ridges(np.asarray(cv2.GaussianBlur(half_HW, (0, 0), scale / 2)), scale / 2, half_2HW)
        size, means = grid_size(image, self.stride), []
        joint = (half_HW if self.stride > 1 else fine_HW).shape[::-1]
        for strength_HW, coarse_HW in zip(fine_2HW, half_2HW, strict=True):
            resized_HW = cv2.resize(strength_HW, joint, interpolation=cv2.INTER_AREA)
            largest_HW = cv2.max(resized_HW, cv2.resize(coarse_HW, joint, interpolation=cv2.INTER_LINEAR))
            means.append(cell_means(np.asarray(largest_HW, np.float32), size))
        return np.sqrt(np.minimum(np.concatenate(means, axis=2) * np.float32(1 / FULL_SCALE), np.float32(1)))


@Kernel
def _add_ridges(smooth_HW, scale, strength_2HW):  # type: ignore[no-untyped-def]
    """Updates the maximum ridge strength (bright, dark) with an image smoothed at `scale`, except at the border."""
    scale_square = np.float32(scale * scale)
    height, width = smooth_HW.shape
    for y in range(1, height - 1):
        above, level, below = smooth_HW[y - 1], smooth_HW[y], smooth_HW[y + 1]
        bright, dark = strength_2HW[0, y], strength_2HW[1, y]
        for x in range(1, width - 1):
            twice = level[x] + level[x]
            xx = level[x - 1] + level[x + 1] - twice
            yy = above[x] + below[x] - twice
            xy = (above[x - 1] + below[x + 1] - above[x + 1] - below[x - 1]) * np.float32(0.25)
            middle = (xx + yy) * np.float32(0.5)
            slant = (xx - yy) * np.float32(0.5)
            spread = np.sqrt(slant * slant + xy * xy)
            bright[x] = max(bright[x], (spread - middle) * scale_square)
            dark[x] = max(dark[x], (spread + middle) * scale_square)


class Symmetry(PriorConfig):
    """Radial symmetry in [0, 1], one channel, a cell every `stride` pixels: large at the centres of round objects.

    Loy & Zelinsky 2003, "Fast radial symmetry for detecting points of interest", for bright and dark discs equally. At
    each radius n, pixels vote n pixels along and against their gradient: F = (|O|/k)^α · |M|/k, smoothed by a Gaussian
    of n/4, k = 9.9 (8 for n = 1); dpkd clips |O| at k. The map is √min(S, 1), with S the mean over the radii.
    """

    kind: Literal["symmetry"] = "symmetry"
    radii: tuple[int, ...] = Field((4, 8, 12, 16), min_length=1)
    """In pixels of the image."""
    strictness: float = Field(2.0, ge=1)
    """α: a larger value favours points with votes from all directions."""
    stride: int = Field(8, ge=1)

    channels: ClassVar[int] = 1
    codec: ClassVar[Codec] = JpegCodec()

    def map(self, image: ImageViews) -> Map:
        total_HW = np.zeros(image.size, np.float32)
        if min(image.size) >= 3:
            dx_HW, dy_HW = cv2.spatialGradient(image.grey8_HW)
            for radius in self.radii:
                votes_HW, amounts_HW = radial_votes(dx_HW, dy_HW, radius)
                most = 8.0 if radius == 1 else 9.9
                share_HW = np.minimum(np.abs(votes_HW) * np.float32(1 / most), np.float32(1))
                point_HW = share_HW ** np.float32(self.strictness) * np.abs(amounts_HW) * np.float32(1 / most)
                total_HW += cv2.GaussianBlur(point_HW, (0, 0), 0.25 * radius)
        strength_HW = total_HW * np.float32(1 / len(self.radii))
        return cell_means(np.sqrt(np.minimum(strength_HW, np.float32(1))), grid_size(image, self.stride))


@Kernel
def radial_votes(dx_HW, dy_HW, radius):  # type: ignore[no-untyped-def]
    """Orientation and magnitude projection at one radius, float32 HW, of a Sobel gradient int16 (8 times the slope)."""
    votes_HW, amounts_HW = np.zeros(dx_HW.shape, np.float32), np.zeros(dx_HW.shape, np.float32)
    height, width = dx_HW.shape
    for y in range(height):
        for x in range(width):
            dx, dy = np.float32(dx_HW[y, x]) / 8, np.float32(dy_HW[y, x]) / 8
            length = np.sqrt(dx * dx + dy * dy)
            if length < WEAKEST:
                continue
            step_x, step_y = int(np.rint(dx / length * radius)), int(np.rint(dy / length * radius))
            for sign in (1, -1):
                at_x, at_y = x + sign * step_x, y + sign * step_y
                if 0 <= at_x < width and 0 <= at_y < height:
                    votes_HW[at_y, at_x] += sign
                    amounts_HW[at_y, at_x] += sign * length
    return votes_HW, amounts_HW
