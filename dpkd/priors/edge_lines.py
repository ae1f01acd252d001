"""Lines of one pixel, and which of them stand."""

import cv2
import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]


def lines(mask_HW: Mask) -> Mask:
    """The mask thinned to lines of one pixel (Guo & Hall 1989)."""
    byte_HW = mask_HW.astype(np.uint8) * np.uint8(255)
    return np.asarray(cv2.ximgproc.thinning(byte_HW, thinningType=cv2.ximgproc.THINNING_GUOHALL) > 0)


def joined(mask_HW: Mask, sure_HW: Mask) -> Mask:
    """Where the mask is joined, over neighbours by side or corner, to a place that is sure (hysteresis, Canny 1986)."""
    number, part_HW = cv2.connectedComponents(mask_HW.astype(np.uint8), connectivity=8)
    sure_N = np.zeros(number, np.bool_)
    sure_N[np.asarray(part_HW)[mask_HW & sure_HW]] = True
    return sure_N[part_HW]
