"""An image as the priors see it: what several of them need is computed once."""

from collections.abc import Mapping
from functools import cached_property
from typing import TypeVar

import cv2
import numpy as np
import numpy.typing as npt

Value = TypeVar("Value", np.uint8, np.float32)


class ImageViews:
    """An RGB image with the views of it that several priors need, each made at first use and not to be written to."""

    def __init__(self, rgb_HWC: npt.NDArray[np.uint8], *, given: Mapping[str, bytes] | None = None) -> None:
        self.rgb_HWC = _locked(rgb_HWC)
        self.given: Mapping[str, bytes] = given or {}
        """What an expert gave with the sample: image files by name; the mask of figure and ground is "mask"."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = self.rgb_HWC.shape[:2]
        return height, width

    @cached_property
    def lab_HWC(self) -> npt.NDArray[np.float32]:  # noqa: N802 (the axes)
        """CIE L*a*b* in its own units, float32: L from 0 to 100."""
        rgb_HWC = self.rgb_HWC.astype(np.float32) * np.float32(1 / 255)
        return _locked(np.asarray(cv2.cvtColor(rgb_HWC, cv2.COLOR_RGB2Lab), np.float32))

    @cached_property
    def lab8_HWC(self) -> npt.NDArray[np.uint8]:  # noqa: N802
        """CIE L*a*b* in bytes: L · 255/100, a + 128, b + 128."""
        return _locked(np.asarray(cv2.cvtColor(self.rgb_HWC, cv2.COLOR_RGB2Lab), np.uint8))

    @cached_property
    def grey8_HW(self) -> npt.NDArray[np.uint8]:  # noqa: N802
        """Luma in bytes."""
        return _locked(np.asarray(cv2.cvtColor(self.rgb_HWC, cv2.COLOR_RGB2GRAY), np.uint8))

    @cached_property
    def grey_HW(self) -> npt.NDArray[np.float32]:  # noqa: N802
        """Luma from 0 to 255, float32."""
        return _locked(self.grey8_HW.astype(np.float32))


def _locked(array: npt.NDArray[Value]) -> npt.NDArray[Value]:
    """A view of the array that refuses to be written to."""
    view = array.view()
    view.flags.writeable = False
    return view
