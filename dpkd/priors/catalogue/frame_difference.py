"""How different each pixel's colour is from those of several regions; loads numba."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from numba import njit


def mahalanobis(image_HWC: npt.NDArray[np.uint8], regions: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float32]:
    """Distance of each pixel to the mean colour of each region (HWC), in the region's deviations; float32 RHW.

    A deviation of one level is added to each region's own, as of noise.
    """
    means_RC, precisions_RCC = [], []
    for region_HWC in regions:
        colour_NC = region_HWC.reshape(-1, 3).astype(np.float64)
        means_RC.append(colour_NC.mean(0))
        centred_NC = colour_NC - means_RC[-1]
        precisions_RCC.append(np.linalg.inv(centred_NC.T @ centred_NC / len(centred_NC) + np.eye(3)))
    means, precisions = np.asarray(means_RC, np.float32), np.asarray(precisions_RCC, np.float32)
    return np.asarray(_distances(np.ascontiguousarray(np.moveaxis(image_HWC, 2, 0)), means, precisions))


@njit(cache=True, error_model="numpy")
def _distances(image_CHW, mean_RC, precision_RCC):  # type: ignore[no-untyped-def]
    _, height, width = image_CHW.shape
    distance_RHW = np.empty((len(mean_RC), height, width), np.float32)
    for r in range(len(mean_RC)):
        m0, m1, m2 = mean_RC[r]
        p = precision_RCC[r]
        p00, p11, p22 = p[0, 0], p[1, 1], p[2, 2]
        p01, p02, p12 = 2 * p[0, 1], 2 * p[0, 2], 2 * p[1, 2]
        for y in range(height):
            first, second, third, distance = image_CHW[0, y], image_CHW[1, y], image_CHW[2, y], distance_RHW[r, y]
            for x in range(width):
                a, b, c = np.float32(first[x]) - m0, np.float32(second[x]) - m1, np.float32(third[x]) - m2
                square = a * (p00 * a + p01 * b + p02 * c) + b * (p11 * b + p12 * c) + c * c * p22
                distance[x] = np.sqrt(max(square, np.float32(0)))
    return distance_RHW
