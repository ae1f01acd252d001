"""Prior maps: one file a prior, a frozen settings model whose `map(image)` does the work; `Prior` is their union.

To add a prior: write its file with the verbs of `dpkd.priors.base.Extractor`, and name its class here. Other
packages bring theirs by an entry point (`dpkd.priors.installed`).
"""

from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Field

from dpkd.priors.base import Extractor
from dpkd.priors.catalogue.colour import Colour
from dpkd.priors.catalogue.edge import Edge
from dpkd.priors.catalogue.expert import Expert
from dpkd.priors.catalogue.gabor import Gabor
from dpkd.priors.catalogue.glcm import Glcm
from dpkd.priors.catalogue.hog import Hog
from dpkd.priors.catalogue.hue import Hue
from dpkd.priors.catalogue.lbp import Lbp
from dpkd.priors.catalogue.orientation import Orientation
from dpkd.priors.catalogue.ridge import Ridge
from dpkd.priors.catalogue.saliency import Saliency
from dpkd.priors.catalogue.superpixel import Superpixel
from dpkd.priors.catalogue.symmetry import Symmetry
from dpkd.priors.installed import installed_priors
from dpkd.priors.learned import Learned

DEFAULT = (Edge, Orientation, Superpixel, Saliency, Lbp, Gabor, Colour, Ridge)
BUILT_IN = (*DEFAULT, Hog, Hue, Symmetry, Glcm, Expert, Learned)
KINDS = (*BUILT_IN, *installed_priors(BUILT_IN))
"""The classes of all priors that settings can name."""

if TYPE_CHECKING:
    Prior = Extractor
else:
    Prior = Annotated[Union[KINDS], Field(discriminator="kind")]  # noqa: UP007 (of a tuple)

DEFAULT_PRIORS: tuple[Prior, ...] = tuple(prior() for prior in DEFAULT)
