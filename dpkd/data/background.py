"""Background replacement: the figure of an image on the ground of another, by a prior map of figure and ground.

The figure keeps its label, so a network that learns from such images cannot read the label off the ground. An idea of
copy-paste augmentation (Dwibedi et al. 2017) with a map that needs no annotation. Axes: B images of a micro-batch,
V views of each, C channels, H and W pixels, h and w cells of the map.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

from dpkd.data.settings import BackgroundSettings
from dpkd.rng import Purpose, uniform

CONTRAST = 1.3
"""Factor of the map: a figure whose saliency is a bit below 1 is kept whole."""
LEAST_FIGURE = 0.03
"""Mean share of figure below which an image keeps its ground: the map has found nothing."""


def replace_backgrounds(
    image_BCHW: NDArray[np.uint8],
    map_B1hw: NDArray[np.float32],
    *,
    settings: BackgroundSettings,
    seed: int,
    index_B: NDArray[np.int64],
    epoch_B: NDArray[np.int64],
) -> NDArray[np.uint8]:
    """The images [V·B], in which a share has the ground of the previous image of its view: `a · x + (1 - a) · other`.

    `a = min(1, 1.3 · S)` with the map S. Chosen by (seed, epoch, sample), the same in all V views; the other image
    depends on the cut of the batch. An image without figure, or with an unknown map (NaN), stays as it is.
    """
    size = len(index_B)
    chosen_B = np.array(
        [
            uniform(1, seed=seed, purpose=Purpose.BACKGROUNDS, place=place)[0] < settings.share
            for place in zip(epoch_B.tolist(), index_B.tolist(), strict=True)
        ]
    )
    result_BCHW = image_BCHW.copy()
    for row, image_CHW in enumerate(image_BCHW):
        view, sample = divmod(row, size)
        source = view * size + (sample - 1) % size if settings.control == "shuffle" else row
        figure_HW = np.minimum(1, CONTRAST * cv2.resize(map_B1hw[source, 0], image_CHW.shape[:0:-1]))
        if chosen_B[sample] and figure_HW.mean() >= LEAST_FIGURE:  # false for NaN
            other_CHW = image_BCHW[view * size + (sample - 1) % size]
            blend_CHW = figure_HW * image_CHW + (1 - figure_HW) * other_CHW
            result_BCHW[row] = np.rint(blend_CHW)
    return result_BCHW
