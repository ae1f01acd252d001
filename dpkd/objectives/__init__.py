"""Objectives: one file each, a frozen settings model that declares its needs and computes its loss.

To add an objective, write a file with the methods of `dpkd.objectives.base.Objective`, and add the class here. For an
objective in another package, set `kind: package.module:Class` in the settings.
"""

from typing import Annotated

from pydantic import AfterValidator, Field, SerializeAsAny

from dpkd.config import any_class_of
from dpkd.objectives.attributes import Attributes
from dpkd.objectives.base import Objective
from dpkd.objectives.decoupled_logits import DecoupledLogits
from dpkd.objectives.features import FeatureDistillation
from dpkd.objectives.locality import LocalityGuidance
from dpkd.objectives.logits import LogitDistillation
from dpkd.objectives.mask_consistency import MaskConsistency
from dpkd.objectives.mask_priors import MaskSaliency, MaskSmoothness
from dpkd.objectives.masked_prior import MaskedPrior
from dpkd.objectives.mixup import Mixup
from dpkd.objectives.multi_label import MultiLabel, MultiLabelDistillation
from dpkd.objectives.patch_labels import PatchLabels
from dpkd.objectives.patch_relations import PatchRelations
from dpkd.objectives.patches import PatchDistillation
from dpkd.objectives.pseudo_labels import PseudoLabels
from dpkd.objectives.region_bounds import RegionBounds
from dpkd.objectives.relations import RelationDistillation
from dpkd.objectives.rotation import Rotation
from dpkd.objectives.segmentation import MaskDistillation, Segmentation
from dpkd.objectives.sigreg import SigReg
from dpkd.objectives.standardised_logits import StandardisedLogits
from dpkd.objectives.supervised import Supervised

BuiltIn = Annotated[
    Supervised
    | MultiLabel
    | Mixup
    | Rotation
    | PseudoLabels
    | SigReg
    | MaskedPrior
    | Attributes
    | RegionBounds
    | LogitDistillation
    | StandardisedLogits
    | DecoupledLogits
    | MultiLabelDistillation
    | FeatureDistillation
    | PatchDistillation
    | RelationDistillation
    | PatchRelations
    | PatchLabels
    | LocalityGuidance
    | Segmentation
    | MaskConsistency
    | MaskDistillation
    | MaskSmoothness
    | MaskSaliency,
    Field(discriminator="kind"),
]


def _complete(objective: Objective) -> Objective:
    """The objective; raises `ValueError` for a class that lacks a method of an objective."""
    lacks = [name for name in ("needs", "loss") if getattr(type(objective), name) is getattr(Objective, name)]
    if lacks:
        raise ValueError(
            f"the objective {objective.kind!r} lacks {', '.join(lacks)}: see dpkd.objectives.base.Objective"
        )
    return objective


AnyObjective = Annotated[SerializeAsAny[BuiltIn], any_class_of(Objective), AfterValidator(_complete)]
"""The settings of an objective: one of the built-in kinds, or a class of any package."""
