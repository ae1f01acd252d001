"""Texture by scale and direction: the energy of Gabor filters."""

from functools import lru_cache
from typing import ClassVar, Literal

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import Field

from dpkd.config import Config
from dpkd.priors.base import ImageViews, PriorDefaults, grid_size
from dpkd.priors.catalogue.kernels import cell_means
from dpkd.priors.codecs import NIBBLES, Codec, Map

Image = npt.NDArray[np.float32]

DIRECTIONS = 4
"""0, 45, 90 and 135 degrees."""
WAVELENGTH_PX = 4.0
"""Of the finest octave; each further one is twice as long."""
SIGMA_PX = 0.56 * WAVELENGTH_PX
"""Of the Gaussian envelope: a bandwidth of one octave (Daugman 1985)."""
FULL_SCALE = 48.0
"""Amplitude, in grey levels, that is stored as 1."""


class Gabor(PriorDefaults, Config):
    """Square root of the filters' amplitude in a cell every `stride` pixels: 4 directions in each octave, in [0, 1].

    Quadrature pairs (Gabor energy, Adelson & Bergen 1985) of luma, of wavelengths 4, 8, 16 ... px on a pyramid:
    amplitude √(even² + odd²), its mean over the cell divided by 48 grey levels, clipped, square-rooted. Channel 4·o + d
    is octave o from the finest, and d the direction of the wave: 0, 45, 90 or 135 degrees from x towards y, y down.
    """

    kind: Literal["gabor"] = "gabor"
    octaves: int = Field(3, ge=1, le=5)
    stride: int = Field(16, ge=2)

    codec: ClassVar[Codec] = NIBBLES

    @property
    def channels(self) -> int:
        """Four directions an octave."""
        return DIRECTIONS * self.octaves

    def map(self, image: ImageViews) -> Map:
        size = grid_size(image, self.stride)
        grey_HW, planes = image.grey_HW, []
        for octave in range(self.octaves):
            if octave:  # by area, which a mirrored image shares
                height, width = ((side + 1) // 2 for side in grey_HW.shape)
                grey_HW = np.asarray(cv2.resize(grey_HW, (width, height), interpolation=cv2.INTER_AREA), np.float32)
            planes.append(cell_means(_amplitudes(grey_HW), size))
        return np.sqrt(np.minimum(np.concatenate(planes, axis=2) * np.float32(1 / FULL_SCALE), np.float32(1)))

    def flip(self, map_HWC: Map) -> Map:
        """The map of the mirrored image: mirrored, with 45 and 135 degrees exchanged."""
        order_C = [octave + d for octave in range(0, self.channels, DIRECTIONS) for d in (0, 3, 2, 1)]
        return np.ascontiguousarray(map_HWC[:, ::-1, order_C])


def _amplitudes(grey_HW: Image) -> Image:
    """√(even² + odd²) of the four directions, HWC.

    exp(i(ux + vy)) is a product of a filter along x and one along y, so each pair is made of separable filters.
    """
    flat, cos, sin = _filters(1.0)
    _, slant_cos, slant_sin = _filters(np.sqrt(0.5))

    def filtered(along_x: Image, along_y: Image) -> Image:
        return np.asarray(cv2.sepFilter2D(grey_HW, -1, along_x, along_y), np.float32)

    across_HW = cv2.magnitude(filtered(cos, flat), filtered(sin, flat))
    down_HW = cv2.magnitude(filtered(flat, cos), filtered(flat, sin))
    cc_HW, ss_HW = filtered(slant_cos, slant_cos), filtered(slant_sin, slant_sin)
    cs_HW, sc_HW = filtered(slant_cos, slant_sin), filtered(slant_sin, slant_cos)
    falling_HW = cv2.magnitude(cv2.subtract(cc_HW, ss_HW), cv2.add(cs_HW, sc_HW))
    rising_HW = cv2.magnitude(cv2.add(cc_HW, ss_HW), cv2.subtract(sc_HW, cs_HW))
    return np.asarray(cv2.merge([across_HW, falling_HW, down_HW, rising_HW]), np.float32)


@lru_cache(maxsize=2)
def _filters(share: float) -> tuple[Image, Image, Image]:
    """A Gaussian, and it times cos and sin of `share` times the frequency; the cosine answers 0 to an even image.

    Each is scaled so that a wave of amplitude 1 that runs along the filter gives an amplitude of 1 (two of them on the
    slant likewise).
    """
    radius = int(np.ceil(2.5 * SIGMA_PX))
    x_N = np.arange(-radius, radius + 1)
    gauss_N = np.exp(-0.5 * (x_N / SIGMA_PX) ** 2)
    gauss_N /= gauss_N.sum()
    phase_N = 2 * np.pi * share * x_N / WAVELENGTH_PX
    even_N = gauss_N * (np.cos(phase_N) - (gauss_N * np.cos(phase_N)).sum())
    scale = np.sqrt(2) if share < 1 else 2.0
    return (
        gauss_N.astype(np.float32),
        (scale * even_N).astype(np.float32),
        (scale * gauss_N * np.sin(phase_N)).astype(np.float32),
    )
