"""Prior maps: each is a frozen settings model whose `map(image)` does the work; `Prior` is their union.

To add one: write a class with the methods of `dpkd.priors.base.Extractor`, and name it here. Other packages bring
theirs under the entry point group `dpkd.priors`; settings know the prior of an installed package by its `kind`:

    [project.entry-points."dpkd.priors"]
    depth = "my_package.depth:Depth"
"""

from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import BaseModel, Field

from dpkd.errors import UserError
from dpkd.priors.base import BatchExtractor, Extractor
from dpkd.priors.catalogue.colour import Colour, Hue
from dpkd.priors.catalogue.edge import Edge
from dpkd.priors.catalogue.orientation import Hog, Orientation
from dpkd.priors.catalogue.regions import Expert, Superpixel
from dpkd.priors.catalogue.saliency import Saliency
from dpkd.priors.catalogue.shape import Ridge, Symmetry
from dpkd.priors.catalogue.texture import Gabor, Glcm, Lbp
from dpkd.priors.learned import Learned

DEFAULT = (Edge, Orientation, Superpixel, Saliency, Lbp, Gabor, Colour, Ridge)
BUILT_IN = (*DEFAULT, Hog, Hue, Symmetry, Glcm, Expert, Learned)


def _installed_priors() -> list[type[BaseModel]]:
    """The classes that installed packages bring, sorted by entry point.

    Raises `UserError` that names package and entry point for one that cannot be imported, lacks a method, or takes a
    kind that is taken already.
    """
    owners = {str(prior.model_fields["kind"].default): "dpkd" for prior in BUILT_IN}
    priors: list[type[BaseModel]] = []
    for entry in sorted(entry_points(group="dpkd.priors"), key=lambda entry: (entry.name, entry.value)):
        package = entry.dist.name if entry.dist is not None else "an installed package"
        place = f"the prior {entry.name!r} of {package} ({entry.value})"
        try:
            prior: Any = entry.load()
        except Exception as error:  # code of others may raise anything
            fault = f"{type(error).__name__}: {error}"
            raise UserError(f"{place} cannot be imported ({fault}); repair or uninstall the package") from error
        if not (isinstance(prior, type) and issubclass(prior, BaseModel)) or "kind" not in prior.model_fields:
            raise UserError(f"{place} is no pydantic model with a `kind`; a prior is one")
        names = [*vars(Extractor), *(vars(BatchExtractor) if hasattr(prior, "maps") else ())]
        known = {*dir(prior), *prior.model_fields}
        if missing := [name for name in names if not name.startswith("_") and name not in known]:
            raise UserError(f"{place} lacks {', '.join(missing)}; see dpkd.priors.base.Extractor")
        if not prior.model_config.get("frozen"):
            raise UserError(f"{place} is not frozen; set model_config = ConfigDict(frozen=True, extra='forbid')")
        kind = str(prior.model_fields["kind"].default)
        if kind in owners:
            raise UserError(f"{place}: the kind {kind!r} is {owners[kind]}'s already; give it another kind")
        owners[kind] = place
        priors.append(prior)
    return priors


KINDS = (*BUILT_IN, *_installed_priors())
"""The classes of all priors that settings can name."""

if TYPE_CHECKING:
    Prior = Extractor
else:
    Prior = Annotated[Union[KINDS], Field(discriminator="kind")]  # noqa: UP007 (of a tuple)

DEFAULT_PRIORS: tuple[Prior, ...] = tuple(prior() for prior in DEFAULT)
