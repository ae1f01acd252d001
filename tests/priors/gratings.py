"""Drawn pictures whose structure is known."""

import numpy as np
import numpy.typing as npt

from dpkd.priors.base import ImageViews


def picture_of(grey_HW: npt.NDArray[np.floating]) -> ImageViews:
    """A grey picture with these levels."""
    return ImageViews(np.repeat(np.rint(np.clip(grey_HW, 0, 255)).astype(np.uint8)[:, :, None], 3, axis=2))


def grating(degrees: float, *, wavelength_px: float, size: int = 96, amplitude: float = 60.0) -> ImageViews:
    """A wave that runs along `degrees` from x towards y, y down."""
    y_HW, x_HW = np.mgrid[:size, :size]
    angle = np.radians(degrees)
    phase_HW = 2 * np.pi * (x_HW * np.cos(angle) + y_HW * np.sin(angle)) / wavelength_px
    return picture_of(127 + amplitude * np.sin(phase_HW))
