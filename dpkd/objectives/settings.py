"""Settings of the objectives: a weighted list for the teacher, and one for each student."""

from typing import Annotated, Literal

from pydantic import Field

from dpkd.section import Section

Weight = Annotated[float, Field(ge=0)]

VIEW_MAPS = {"hog": 9}
"""Channels of the maps that training makes of the view itself where no prior set holds them."""


class Supervised(Section):
    """Cross-entropy on the visible labels; samples without one do not count."""

    kind: Literal["supervised"] = "supervised"
    weight: Weight = 1.0
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    balance: Literal["none", "logit_adjusted"] = "none"
    """`logit_adjusted` adds `tau * log(class prior)` to the logits (Menon et al. 2021); tau 1 is balanced softmax."""
    tau: float = Field(1.0, ge=0)


class MaskedPrior(Section):
    """Predicts prior maps from the patch features of a partly masked view (MaskFeat, Wei et al. 2022)."""

    kind: Literal["masked_prior"] = "masked_prior"
    weight: Weight = 1.0
    mask_ratio: float = Field(0.4, ge=0, lt=1)
    """Share of patches hidden; 0 predicts the maps of the whole view, with no second view."""
    targets: dict[str, Weight] = Field({"hog": 1.0}, min_length=1)
    """Weight of each prior map to predict; `hog` need not be prepared."""


class LogitDistillation(Section):
    """`temperature² · KL(teacher ‖ student)` on softened logits (Hinton et al. 2015)."""

    kind: Literal["logits"] = "logits"
    weight: Weight = 1.0
    temperature: float = Field(2.0, gt=0)


class FeatureDistillation(Section):
    """`0.5 (1 - cosine) + 0.5 smooth-L1` between standardised embeddings (UNIC, Sariyildiz et al. 2024)."""

    kind: Literal["features"] = "features"
    weight: Weight = 1.0


class PatchDistillation(Section):
    """Distance between patch features, patch i weighted by `1 + saliency · S_i + edge · E_i`."""

    kind: Literal["patches"] = "patches"
    weight: Weight = 1.0
    saliency: float = Field(1.0, ge=0)
    edge: float = Field(2.0, ge=0)


def maps_taken(objective: Section) -> tuple[str, ...]:
    """Names of the prior maps that an objective looks at."""
    if isinstance(objective, MaskedPrior):
        return tuple(objective.targets)
    if isinstance(objective, PatchDistillation):
        weighed = {"saliency": objective.saliency, "edge": objective.edge}
        return tuple(name for name, weight in weighed.items() if weight)
    return ()


TeacherObjective = Annotated[Supervised | MaskedPrior, Field(discriminator="kind")]
StudentObjective = Annotated[
    Supervised | MaskedPrior | LogitDistillation | FeatureDistillation | PatchDistillation, Field(discriminator="kind")
]
