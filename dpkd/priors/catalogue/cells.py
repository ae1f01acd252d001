"""Maps on a coarse grid: means over cells, by area, whatever their number and that of the channels."""

import cv2
import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.float32]

OPENCV_CHANNELS = 4
"""Channels that OpenCV's area resampling takes at a time."""


def cell_means(image_HWC: Image, size: tuple[int, int]) -> Image:
    """The mean of each of height x width cells, by area; float32 HWC also of an image without a channel axis.

    Where the grid is finer than the image, values are interpolated.
    """
    height, width = size
    planes = image_HWC.reshape(*image_HWC.shape[:2], -1)
    means = [
        cv2.resize(planes[:, :, start : start + OPENCV_CHANNELS], (width, height), interpolation=cv2.INTER_AREA)
        for start in range(0, planes.shape[2], OPENCV_CHANNELS)
    ]
    return np.concatenate([np.asarray(mean, np.float32).reshape(height, width, -1) for mean in means], axis=2)
