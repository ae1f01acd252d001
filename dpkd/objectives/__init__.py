"""Objectives: one file each, a frozen settings model that declares its needs and computes its loss.

To add one: write its file with the methods of `dpkd.objectives.base.Objective`, and name its class here. An objective
of your own package is named in the settings as `kind: package.module:Class`.
"""

import importlib
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, SerializeAsAny, ValidationError, WrapValidator

from dpkd.objectives.attributes import Attributes
from dpkd.objectives.base import Objective
from dpkd.objectives.decoupled_logits import DecoupledLogits
from dpkd.objectives.features import FeatureDistillation
from dpkd.objectives.logits import LogitDistillation
from dpkd.objectives.masked_prior import MaskedPrior
from dpkd.objectives.patches import PatchDistillation
from dpkd.objectives.region_bounds import RegionBounds
from dpkd.objectives.standardised_logits import StandardisedLogits
from dpkd.objectives.supervised import Supervised

BuiltIn = Annotated[
    Supervised
    | MaskedPrior
    | Attributes
    | RegionBounds
    | LogitDistillation
    | StandardisedLogits
    | DecoupledLogits
    | FeatureDistillation
    | PatchDistillation,
    Field(discriminator="kind"),
]


def _of_any_package(value: Any, built_in: Any) -> Any:
    """Settings of `kind: package.module:Class` as an object of that class; all others as the built-in kinds."""
    if isinstance(value, Objective):
        return value
    kind = value.get("kind") if isinstance(value, Mapping) else None
    if not isinstance(kind, str) or ":" not in kind:
        return built_in(value)
    module, _, name = kind.partition(":")
    try:
        return getattr(importlib.import_module(module), name).model_validate(value)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise ValueError(faults) from None
    except (ImportError, AttributeError) as error:
        raise ValueError(f"kind {kind!r} cannot be loaded ({error}): give package.module:Class") from None


AnyObjective = Annotated[SerializeAsAny[BuiltIn], WrapValidator(_of_any_package)]
"""The settings of an objective: one of the built-in kinds, or a class of any package."""
