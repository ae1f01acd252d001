"""Where boundaries are: several cues over four octaves, weighed against what people drew."""

from typing import ClassVar, Literal

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import Field

from dpkd.config import Config
from dpkd.priors.base import grid_size, mirror
from dpkd.priors.catalogue.cells import cell_means
from dpkd.priors.codecs import Map, NibbleCodec
from dpkd.priors.image_views import Picture

LEAST, SURE = 0.11, 0.22
"""A crest counts where it is at least as probable as the first, and joined to a place as probable as the second."""


class Edge(Config):
    """Probability that a person draws a boundary, one channel, a cell every `stride` pixels.

    logit P = b + Σ_k w_k ln(c_k + 1/2), a weighted product of cues c_k of the Lab image (`edge_cues.levels`): gradients
    over scales, along lines and of texture speak for a boundary, as in Martin, Fowlkes & Malik 2004 (Pb), and much of
    the same around against it. The weights are those of a logistic regression on the 100 images of BSDS500 val.
    """

    kind: Literal["edge"] = "edge"
    thin: bool = True
    """Keeps the crests alone, one cell wide, by hysteresis from 0.11 to 0.22: few bytes, and sharp when enlarged."""
    stride: int = Field(2, ge=1)

    name: ClassVar[str] = "edge"
    version: ClassVar[int] = 2
    channels: ClassVar[int] = 1
    nearest: ClassVar[bool] = False
    codec: ClassVar[NibbleCodec] = NibbleCodec()

    def map(self, picture: Picture) -> Map:
        """Boundary probability of an image, float32 HW1."""
        from dpkd.priors.catalogue.edge_cues import boundary_odds, enlarged  # noqa: PLC0415 (numba must not load with settings)
        from dpkd.priors.catalogue.edge_kernels import crests  # noqa: PLC0415

        odds_HW, size = boundary_odds(picture.lab_HWC), grid_size(picture, self.stride)
        if odds_HW.shape != size:
            finer = size[0] > odds_HW.shape[0] or size[1] > odds_HW.shape[1]
            odds_HW = enlarged(odds_HW, size, cubic=True) if finer else cell_means(odds_HW, size)[:, :, 0]
        probability_HW = np.asarray(1 / (1 + np.exp(-odds_HW)), np.float32)
        if self.thin:
            crest_HW = crests(probability_HW, direction_px=1.0, fine_px=0.5, least=LEAST)
            probability_HW = np.where(_joined(crest_HW), crest_HW, np.float32(0))
        return np.asarray(probability_HW[:, :, None], np.float32)

    def flip(self, map_HWC: Map) -> Map:
        """The map of the mirrored image."""
        return mirror(map_HWC)


def _joined(crest_HW: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Where a crest is joined, over neighbours by side or corner, to a `SURE` place (hysteresis, Canny 1986)."""
    number, line_HW = cv2.connectedComponents((crest_HW > 0).astype(np.uint8), connectivity=8)
    sure_N = np.zeros(number, np.bool_)
    sure_N[line_HW[crest_HW >= SURE]] = True
    return sure_N[line_HW]
