"""Settings of the objectives: a weighted list for the teacher, and one for each student."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dpkd.config import Config

Weight = Annotated[float, Field(ge=0)]

VIEW_MAPS = {"hog": 9}
"""Channels of the maps that training makes of the view itself where no prior set holds them."""


class Supervised(Config):
    """Cross-entropy on the visible labels; samples without one do not count."""

    kind: Literal["supervised"] = "supervised"
    weight: Weight = 1.0
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    balance: Literal["none", "logit_adjusted"] = "none"
    """`logit_adjusted` adds `tau * log(class prior)` to the logits (Menon et al. 2021); tau 1 is balanced softmax."""
    tau: float = Field(1.0, ge=0)


class MaskedPrior(Config):
    """Predicts prior maps from the patch features of a partly masked view (MaskFeat, Wei et al. 2022)."""

    kind: Literal["masked_prior"] = "masked_prior"
    weight: Weight = 1.0
    mask_ratio: float = Field(0.4, ge=0, lt=1)
    """Share of patches hidden; 0 predicts the maps of the whole view, with no second view."""
    targets: dict[str, Weight] = Field({"hog": 1.0}, min_length=1)
    """Weight of each prior map to predict; `hog` need not be prepared."""


class Attributes(Config):
    """Predicts the attributes that `data.attributes` gives the class of each labelled sample, from the embedding."""

    kind: Literal["attributes"] = "attributes"
    weight: Weight = 1.0
    classify: Weight = 0.0
    """Weight of cross-entropy over the trained classes, told apart by the predicted attributes alone."""


STATISTICS: dict[str, tuple[float, float]] = {
    "area": (0, 1),
    "row": (0, 1),
    "column": (0, 1),
    "compactness": (0, 1),
    "red": (0, 1),
    "green": (0, 1),
    "blue": (0, 1),
    "lightness": (0, 100),
    "a": (-128, 128),
    "b": (-128, 128),
}
"""What is measured of a predicted region (`region_bounds.py` defines each), with the least and greatest it can be."""

COLOUR_STATISTICS = ("red", "green", "blue", "lightness", "a", "b")


class Bound(Config):
    """What an expert says of a region: a statistic of it is at least, or at most, so much."""

    statistic: Literal["area", "row", "column", "compactness", "red", "green", "blue", "lightness", "a", "b"]
    at_least: float | None = None
    at_most: float | None = None
    classes: tuple[str, ...] = ()
    """Samples with a visible label of these classes alone; none binds every image, labelled or not."""

    @model_validator(mode="after")
    def _can_be_met(self) -> "Bound":
        low, high = STATISTICS[self.statistic]
        given = {"at_least": self.at_least, "at_most": self.at_most}
        for key, value in given.items():
            if value is not None and not low <= value <= high:
                raise ValueError(f"{key} {value:g} is out of range: {self.statistic} lies between {low:g} and {high:g}")
        if self.at_least is None and self.at_most is None:
            raise ValueError(f"bounds {self.statistic} by nothing: give at_least, at_most, or both")
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise ValueError(f"at_least {self.at_least:g} is above at_most {self.at_most:g}: no region can be both")
        return self


class RegionBounds(Config):
    """Predicts a region from the patch features: like a prior map where that is known, within bounds everywhere."""

    kind: Literal["region_bounds"] = "region_bounds"
    weight: Weight = 1.0
    """Of the penalty on statistics out of bounds."""
    of: str
    """A prior map of one channel of amounts in [0, 1], such as `saliency` or `expert-mask`."""
    fit: float = Field(1.0, gt=0)
    """Weight of the cross-entropy between the region and the map."""
    bounds: tuple[Bound, ...] = Field(min_length=1)


class LogitDistillation(Config):
    """`temperature² · KL(teacher ‖ student)` on softened logits (Hinton et al. 2015)."""

    kind: Literal["logits"] = "logits"
    weight: Weight = 1.0
    temperature: float = Field(2.0, gt=0)


class FeatureDistillation(Config):
    """`0.5 (1 - cosine) + 0.5 smooth-L1` between standardised embeddings (UNIC, Sariyildiz et al. 2024)."""

    kind: Literal["features"] = "features"
    weight: Weight = 1.0


class PatchDistillation(Config):
    """Distance between patch features, patch i weighted by `1 + saliency · S_i + edge · E_i`."""

    kind: Literal["patches"] = "patches"
    weight: Weight = 1.0
    saliency: float = Field(1.0, ge=0)
    edge: float = Field(2.0, ge=0)


def maps_taken(objective: Config) -> tuple[str, ...]:
    """Names of the prior maps that an objective looks at."""
    if isinstance(objective, MaskedPrior):
        return tuple(objective.targets)
    if isinstance(objective, PatchDistillation):
        weighed = {"saliency": objective.saliency, "edge": objective.edge}
        return tuple(name for name, weight in weighed.items() if weight)
    return (objective.of,) if isinstance(objective, RegionBounds) else ()


TeacherObjective = Annotated[Supervised | MaskedPrior | Attributes | RegionBounds, Field(discriminator="kind")]
StudentObjective = Annotated[
    Supervised | MaskedPrior | Attributes | RegionBounds | LogitDistillation | FeatureDistillation | PatchDistillation,
    Field(discriminator="kind"),
]
