"""The losses of expert statements: attributes of classes, and bounds on the statistics of predicted regions.

Axes: B sample, K class, A attribute, C colour, H W height and width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpkd.data.stream import Batch
from dpkd.objectives.attributes import classify_by_attributes, predict_attributes
from dpkd.objectives.region_bounds import bound_penalty, fit_region, region_statistic
from dpkd.objectives.settings import Attributes, Bound, RegionBounds, StudentObjective


@dataclass(frozen=True)
class ClassAttributes:
    """The attributes of the trained classes, in the order of the labels."""

    value_KA: Tensor
    """NaN where not known."""
    weight_KA: Tensor
    bias_K: Tensor
    """With `weight_KA`: how predicted attributes score the classes (`dpkd.data.attributes.score_weights`)."""


@dataclass(frozen=True)
class Statements:
    """What experts say of the trained classes; `class_names` is in the order of the labels."""

    class_names: tuple[str, ...] = ()
    attributes: ClassAttributes | None = None


def statement_losses(
    objectives: Sequence[StudentObjective],
    outputs: Mapping[str, Tensor],
    batch: Batch,
    *,
    statements: Statements,
    labelled_share: float,
) -> dict[str, Tensor]:
    """The weighted losses of those objectives that are expert statements."""
    losses: dict[str, Tensor] = {}
    for objective in objectives:
        if isinstance(objective, Attributes):
            assert statements.attributes is not None, "attributes are learnt from a table"
            losses |= _attribute_losses(
                objective, outputs["attributes"], batch, table=statements.attributes, labelled_share=labelled_share
            )
        elif isinstance(objective, RegionBounds):
            losses |= _region_losses(objective, outputs[f"region.{objective.of}"], batch, statements.class_names)
    return losses


def _attribute_losses(
    objective: Attributes, logit_BA: Tensor, batch: Batch, *, table: ClassAttributes, labelled_share: float
) -> dict[str, Tensor]:
    loss = predict_attributes(logit_BA, batch.label_B, table.value_KA, labelled_share=labelled_share)
    losses = {"attributes": objective.weight * loss}
    if objective.classify:
        loss = classify_by_attributes(
            logit_BA,
            batch.label_B,
            weight_KA=table.weight_KA,
            bias_K=table.bias_K,
            labelled_share=labelled_share,
        )
        losses["attributes.classify"] = objective.weight * objective.classify * loss
    return losses


def _region_losses(
    objective: RegionBounds, logit_B1HW: Tensor, batch: Batch, class_names: Sequence[str]
) -> dict[str, Tensor]:
    losses = {f"region.{objective.of}": objective.fit * fit_region(logit_B1HW, batch.priors[objective.of])}
    region_B1HW = logit_B1HW.float().sigmoid()
    for bound in objective.bounds:
        penalty = bound_penalty(
            region_statistic(bound.statistic, region_B1HW, batch.image_BCHW),
            statistic=bound.statistic,
            at_least=bound.at_least,
            at_most=bound.at_most,
            bound_B=_bound_samples(bound, batch.label_B, class_names),
        )
        key = f"region_bounds.{objective.of}.{bound.statistic}"
        losses[key] = losses.get(key, 0) + objective.weight * penalty
    return losses


def _bound_samples(bound: Bound, label_B: Tensor, class_names: Sequence[str]) -> Tensor | None:
    """Which samples the bound binds, bool B; none where it binds all."""
    if not bound.classes:
        return None
    labels = torch.tensor([class_names.index(name) for name in bound.classes], device=label_B.device)
    return torch.isin(label_B, labels)
