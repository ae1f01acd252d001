"""Prior maps: one file a prior, a frozen settings model whose `map(image)` does the work; `Prior` is their union.

To add a prior: write its file with the verbs of `dpkd.priors.extractor.Extractor`, and name its class in `Prior` here.
"""

from typing import Annotated

from pydantic import Field

from dpkd.priors.edge import Edge
from dpkd.priors.hog import Hog
from dpkd.priors.saliency import Saliency
from dpkd.priors.superpixel import Superpixel

Prior = Annotated[Edge | Saliency | Superpixel | Hog, Field(discriminator="kind")]

DEFAULT_PRIORS: tuple[Prior, ...] = (Edge(), Saliency(), Superpixel(), Hog())
