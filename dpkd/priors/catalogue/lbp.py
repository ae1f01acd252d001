"""Fine texture: histograms of local binary patterns."""

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from dpkd.config import Config
from dpkd.priors.base import grid_size, mirror
from dpkd.priors.codecs import Map, NibbleCodec
from dpkd.priors.image_views import Picture


class Lbp(Config):
    """Square roots of the shares of ten patterns in a cell every `stride` pixels: ten channels in [0, 1].

    Rotation-invariant uniform patterns of 8 neighbours at radius 1 (Ojala, Pietikäinen & Mäenpää 2002, LBP^riu2_8,1)
    of luma: channels 0 to 8 count neighbours that are no darker than the centre, 9 is any pattern with more than two
    changes around the circle. No change of the light that keeps the order of the grey levels changes the map.
    """

    kind: Literal["lbp"] = "lbp"
    stride: int = Field(16, ge=2)

    name: ClassVar[str] = "lbp"
    version: ClassVar[int] = 1
    channels: ClassVar[int] = 10
    nearest: ClassVar[bool] = False
    codec: ClassVar[NibbleCodec] = NibbleCodec()

    def map(self, picture: Picture) -> Map:
        """Square-rooted shares of the patterns, float32 HWC."""
        from dpkd.priors.catalogue.cell_histogram import cell_histogram  # noqa: PLC0415 (numba must not load with the settings)
        from dpkd.priors.catalogue.local_patterns import uniform_patterns  # noqa: PLC0415

        pattern_HW = uniform_patterns(picture.grey8_HW)
        return np.sqrt(cell_histogram(pattern_HW, num_bins=self.channels, size=grid_size(picture, self.stride)))

    def flip(self, map_HWC: Map) -> Map:
        """The map of the mirrored image."""
        return mirror(map_HWC)
