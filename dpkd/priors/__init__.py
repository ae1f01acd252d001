"""Prior maps: one file a prior, a frozen settings model whose `map(picture)` does the work; `Prior` is their union.

To add a prior: write its file with the verbs of `dpkd.priors.extractor.Extractor`, and name its class in `Prior` here.
"""

from typing import Annotated

from pydantic import Field

from dpkd.priors.colour import Colour
from dpkd.priors.edge import Edge
from dpkd.priors.expert import Expert
from dpkd.priors.gabor import Gabor
from dpkd.priors.glcm import Glcm
from dpkd.priors.hog import Hog
from dpkd.priors.hue import Hue
from dpkd.priors.lbp import Lbp
from dpkd.priors.orientation import Orientation
from dpkd.priors.ridge import Ridge
from dpkd.priors.saliency import Saliency
from dpkd.priors.superpixel import Superpixel
from dpkd.priors.symmetry import Symmetry

Prior = Annotated[
    Edge | Orientation | Superpixel | Saliency | Lbp | Gabor | Colour | Ridge | Hog | Hue | Symmetry | Glcm | Expert,
    Field(discriminator="kind"),
]

DEFAULT_PRIORS: tuple[Prior, ...] = (
    Edge(),
    Orientation(),
    Superpixel(),
    Saliency(),
    Lbp(),
    Gabor(),
    Colour(),
    Ridge(),
)
