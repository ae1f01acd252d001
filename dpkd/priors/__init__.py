"""Prior maps: each prior is a frozen settings model that computes `map(image)`; `Prior` is their union.

To add a prior, write a subclass of `dpkd.priors.base.PriorConfig` with `channels`, `codec` and `map`, and add it here.
For a prior in another package, set `kind: package.module:Class` in the settings.
"""

from typing import TYPE_CHECKING, Annotated, Union

from pydantic import AfterValidator, Field, SerializeAsAny

from dpkd.config import any_class_of
from dpkd.priors.base import BatchExtractor, PriorConfig
from dpkd.priors.catalogue.colour import Colour, Hue
from dpkd.priors.catalogue.edge import Edge
from dpkd.priors.catalogue.orientation import Hog, Orientation
from dpkd.priors.catalogue.regions import Expert, Mask, Superpixel
from dpkd.priors.catalogue.saliency import Saliency
from dpkd.priors.catalogue.shape import Ridge, Symmetry
from dpkd.priors.catalogue.texture import Gabor, Glcm, Lbp
from dpkd.priors.learned import Learned

DEFAULT = (Edge, Orientation, Superpixel, Saliency, Lbp, Gabor, Colour, Ridge)
BUILT_IN = (*DEFAULT, Hog, Hue, Symmetry, Glcm, Expert, Mask, Learned)


def _complete(prior: PriorConfig) -> PriorConfig:
    """The prior; raises `ValueError` for a class that lacks a method or property of a prior."""
    of_batches = [name for name in vars(BatchExtractor) if not name.startswith("_")]
    names = ["channels", "codec", "map", *(of_batches if hasattr(prior, "maps") else ())]
    if missing := [name for name in names if not hasattr(prior, name)]:
        raise ValueError(f"the prior {prior.kind!r} lacks {', '.join(missing)}: see dpkd.priors.base.PriorConfig")
    return prior


if TYPE_CHECKING:
    Prior = PriorConfig
else:
    BuiltIn = Annotated[Union[BUILT_IN], Field(discriminator="kind")]  # noqa: UP007 (of a tuple)
    Prior = Annotated[SerializeAsAny[BuiltIn], any_class_of(PriorConfig), AfterValidator(_complete)]

DEFAULT_PRIORS: tuple[Prior, ...] = tuple(prior() for prior in DEFAULT)
