"""Priors that other packages bring: each names its class under the entry point group `dpkd.priors`.

    [project.entry-points."dpkd.priors"]
    depth = "my_package.depth:Depth"

The class is a frozen pydantic model with a `kind` and the verbs of `dpkd.priors.base.Extractor`; once the package
is installed, settings know it by that kind.
"""

from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pydantic import BaseModel

from dpkd.errors import UserError
from dpkd.priors.base import BatchExtractor, Extractor


def installed_priors(built_in: Sequence[type[BaseModel]]) -> list[type[BaseModel]]:
    """The classes of all installed packages, sorted by entry point.

    Raises `UserError` that names package and entry point for one that cannot be imported, lacks a verb, or takes a kind
    that is taken already.
    """
    owner = {prior.model_fields["kind"].default: "dpkd" for prior in built_in}
    priors = []
    for entry in sorted(entry_points(group="dpkd.priors"), key=lambda entry: (entry.name, entry.value)):
        package = entry.dist.name if entry.dist is not None else "an installed package"
        place = f"the prior {entry.name!r} of {package} ({entry.value})"
        prior = _load(entry, place)
        kind = prior.model_fields["kind"].default
        if kind in owner:
            raise UserError(f"{place}: the kind {kind!r} is {owner[kind]}'s already; give it another kind")
        owner[kind] = place
        priors.append(prior)
    return priors


def _load(entry: EntryPoint, place: str) -> type[BaseModel]:
    try:
        prior: Any = entry.load()
    except Exception as error:  # whatever somebody else's module raises
        fault = f"{type(error).__name__}: {error}"
        raise UserError(f"{place} cannot be imported ({fault}); mend or uninstall the package") from error
    if not (isinstance(prior, type) and issubclass(prior, BaseModel)) or "kind" not in prior.model_fields:
        raise UserError(f"{place} is no pydantic model with a `kind`; a prior is one")
    verbs = [*vars(Extractor), *(vars(BatchExtractor) if hasattr(prior, "maps") else ())]
    known = {*dir(prior), *prior.model_fields}
    if missing := [verb for verb in verbs if not verb.startswith("_") and verb not in known]:
        raise UserError(f"{place} lacks {', '.join(missing)}; see dpkd.priors.base.Extractor")
    if not prior.model_config.get("frozen"):
        raise UserError(f"{place} is not frozen; set model_config = ConfigDict(frozen=True, extra='forbid')")
    return prior
