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
from dpkd.priors.base import BATCH_VERBS

GROUP = "dpkd.priors"
VERBS = ("name", "version", "channels", "nearest", "codec", "map", "flip")


def installed_priors(built_in: Sequence[type[BaseModel]]) -> list[type[BaseModel]]:
    """The classes of all installed packages, sorted by entry point.

    Raises `UserError` that names package and entry point for one that cannot be imported, lacks a verb, or takes a kind
    that is taken already.
    """
    owner = {_kind(prior): "dpkd" for prior in built_in}
    priors = []
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value)):
        prior = _load(entry)
        kind = _kind(prior)
        if kind in owner:
            raise UserError(f"{_place(entry)}: the kind {kind!r} is {owner[kind]}'s already; give it another kind")
        owner[kind] = _place(entry)
        priors.append(prior)
    return priors


def _load(entry: EntryPoint) -> type[BaseModel]:
    try:
        prior: Any = entry.load()
    except Exception as error:  # whatever somebody else's module raises
        raise UserError(
            f"{_place(entry)} cannot be imported ({type(error).__name__}: {error}); mend or uninstall the package"
        ) from error
    if not (isinstance(prior, type) and issubclass(prior, BaseModel)) or "kind" not in prior.model_fields:
        raise UserError(f"{_place(entry)} is no pydantic model with a `kind`; a prior is one")
    verbs = (*VERBS, *BATCH_VERBS) if hasattr(prior, "maps") else VERBS
    missing = [verb for verb in verbs if not hasattr(prior, verb) and verb not in prior.model_fields]
    if missing:
        raise UserError(f"{_place(entry)} lacks {', '.join(missing)}; see dpkd.priors.base.Extractor")
    if not prior.model_config.get("frozen"):
        raise UserError(f"{_place(entry)} is not frozen; set model_config = ConfigDict(frozen=True, extra='forbid')")
    return prior


def _kind(prior: type[BaseModel]) -> str:
    return str(prior.model_fields["kind"].default)


def _place(entry: EntryPoint) -> str:
    package = entry.dist.name if entry.dist is not None else "an installed package"
    return f"the prior {entry.name!r} of {package} ({entry.value})"
