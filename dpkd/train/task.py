"""Tasks: what each network minimises on a batch. A network's own objectives need the batch alone; distillation also
needs the teacher's outputs, which are computed once and serve every student.

Axes: B sample, C channel, H W height and width, K classes.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from dpkd.data.augment import normalise
from dpkd.data.stream import Batch
from dpkd.engine.optimizer import learning_rate
from dpkd.engine.protocol import Engine
from dpkd.engine.settings import OptimizerSettings, ScheduleSettings
from dpkd.models.network import Network
from dpkd.models.settings import FigureGroundPooling, NetworkSpec
from dpkd.objectives.draws import random_share
from dpkd.objectives.features import distil_embedding
from dpkd.objectives.hog import hog
from dpkd.objectives.logits import distil_logits
from dpkd.objectives.masked_prior import hide_patches, masked_prior, prior_target, random_patch_mask
from dpkd.objectives.patches import distil_patches, patch_weight
from dpkd.objectives.settings import (
    FeatureDistillation,
    LogitDistillation,
    MaskedPrior,
    PatchDistillation,
    StudentObjective,
    Supervised,
    maps_taken,
)
from dpkd.objectives.supervised import supervised
from dpkd.train.loop import Losses
from dpkd.train.statements import Statements, statement_losses

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Supervision:
    """What the visible labels of the training split say as a whole."""

    labelled_share: float
    log_prior_K: Tensor
    statements: Statements


@dataclass(frozen=True)
class Learner:
    """One network that is trained: its engine, what it minimises, and its learning rate over the stage."""

    engine: Engine
    network: Network
    objectives: Sequence[StudentObjective]
    optimizer: OptimizerSettings
    schedule: ScheduleSettings
    total_steps: int

    @property
    def spec(self) -> NetworkSpec:
        """What the network was built from."""
        return self.network.spec

    def learning_rate(self, step: int) -> float:
        """The rate at a step, before layer-wise decay."""
        base = self.optimizer.learning_rate
        return learning_rate(step, total_steps=self.total_steps, base=base, settings=self.schedule)

    @property
    def maps(self) -> frozenset[str]:
        """Names of the prior maps that its objectives and its pooling take."""
        taken = {name for objective in self.objectives for name in maps_taken(objective)}
        return frozenset(taken | pooling_maps(self.spec))

    def masking(self) -> MaskedPrior | None:
        """The objective that needs a second, partly hidden view, if there is one."""
        found = [objective for objective in self.objectives if isinstance(objective, MaskedPrior)]
        return found[0] if found and found[0].mask_ratio > 0 else None


class Predictor(Protocol):
    """A network that only looks, such as a frozen teacher."""

    @property
    def spec(self) -> NetworkSpec:
        """What the network was built from."""

    def predict(self, image_BCHW: Tensor, weight_B1HW: Tensor | None = None) -> Outputs:
        """Runs without gradients, in evaluation mode."""


@dataclass(frozen=True)
class View:
    """A network's outputs on the batch as it is and, where an objective hides patches, on the hidden view."""

    outputs: Outputs
    hidden_outputs: Outputs | None = None
    mask_B1HW: Tensor | None = None


class TeachTask:
    """One network under its own objectives."""

    def __init__(self, learner: Learner, *, name: str, supervision: Supervision, seed: int) -> None:
        self.learners = {name: learner}
        self.engines: dict[str, Engine] = {name: learner.engine}
        self.maps = learner.maps
        self._name, self._supervision, self._seed = name, supervision, seed

    def losses(self, batch: Batch, *, step: int) -> Losses:
        """The network's own losses."""
        learner, batch = self.learners[self._name], with_view_maps(batch, self.maps)
        view = look(learner, batch, step=step, seed=self._seed)
        return {self._name: own_losses(learner.objectives, view, batch, supervision=self._supervision)}

    def learning_rate(self, name: str, *, step: int) -> float:
        """Learning rate of the network at a step."""
        return self.learners[name].learning_rate(step)


class DistillTask:
    """Students under a teacher that is frozen (a `Predictor`) or goes on learning (a `Learner`, in the same steps)."""

    def __init__(
        self,
        students: Mapping[str, Learner],
        *,
        teacher: Predictor | Learner,
        teacher_name: str,
        supervision: Supervision,
        seed: int,
    ) -> None:
        live = {teacher_name: teacher} if isinstance(teacher, Learner) else {}
        self.students = dict(students)
        self.learners = {**live, **students}
        self.engines: dict[str, Engine] = {name: learner.engine for name, learner in self.learners.items()}
        self.maps = frozenset().union(pooling_maps(teacher.spec), *(learner.maps for learner in self.learners.values()))
        """Names of the prior maps that a batch must bring."""
        self._teacher, self._teacher_name = teacher, teacher_name
        self._supervision, self._seed = supervision, seed

    def losses(self, batch: Batch, *, step: int) -> Losses:
        """Each student's own and distillation losses; a live teacher's own."""
        losses: Losses = {}
        batch = with_view_maps(batch, self.maps)
        if isinstance(self._teacher, Learner):
            view = look(self._teacher, batch, step=step, seed=self._seed)
            own = own_losses(self._teacher.objectives, view, batch, supervision=self._supervision)
            losses[self._teacher_name] = own
            taught = {key: output.detach() for key, output in view.outputs.items()}
        else:
            image_BCHW = network_input(self._teacher.spec, batch)
            taught = self._teacher.predict(image_BCHW, pooling_weight(self._teacher.spec, batch))
        for name, student in self.students.items():
            view = look(student, batch, step=step, seed=self._seed)
            own = own_losses(student.objectives, view, batch, supervision=self._supervision)
            losses[name] = own | distillation_losses(student.objectives, view.outputs, taught, batch)
        return losses

    def learning_rate(self, name: str, *, step: int) -> float:
        """Learning rate of one network at a step."""
        return self.learners[name].learning_rate(step)


def with_view_maps(batch: Batch, names: Collection[str]) -> Batch:
    """The batch with those of the maps `names` that are made of its views, where it did not bring them."""
    if "hog" not in names or "hog" in batch.priors:
        return batch
    return replace(batch, priors={**batch.priors, "hog": hog(batch.image_BCHW)})


def look(learner: Learner, batch: Batch, *, step: int, seed: int) -> View:
    """Runs a network in training mode; the hidden view, where one is needed, shares the same forward pass."""
    image_BCHW = network_input(learner.spec, batch)
    weight_B1HW = training_weight(learner.spec, batch, step=step, seed=seed)
    masking = learner.masking()
    if masking is None:
        return View(learner.engine.forward(image_BCHW, weight_B1HW))
    mask_B1HW = random_patch_mask(
        batch.index_B, step=step, grid=learner.network.grid, ratio=masking.mask_ratio, seed=seed
    )
    both_BCHW = torch.cat([image_BCHW, hide_patches(image_BCHW, mask_B1HW)])
    both_weights = None if weight_B1HW is None else torch.cat([weight_B1HW, weight_B1HW])
    outputs = learner.engine.forward(both_BCHW, both_weights)
    size = len(image_BCHW)
    seen = {key: output[:size] for key, output in outputs.items()}
    hidden = {key: output[size:] for key, output in outputs.items()}
    return View(seen, hidden, mask_B1HW)


def network_input(spec: NetworkSpec, batch: Batch) -> Tensor:
    """The batch's images as the network takes them."""
    return normalise(batch.image_BCHW, mean=spec.mean, std=spec.std)


def pooling_maps(spec: NetworkSpec) -> frozenset[str]:
    """Name of the prior map that the network's pooling takes, if it takes one."""
    pooling = spec.model.pooling
    return frozenset({pooling.prior} if isinstance(pooling, FigureGroundPooling) else ())


def pooling_weight(spec: NetworkSpec, batch: Batch) -> Tensor | None:
    """The prior map that the network's pooling weighs patches by, if it does; even where the map is not known."""
    pooling = spec.model.pooling
    return batch.priors[pooling.prior].nan_to_num(nan=1.0) if isinstance(pooling, FigureGroundPooling) else None


def training_weight(spec: NetworkSpec, batch: Batch, *, step: int, seed: int) -> Tensor | None:
    """`pooling_weight` with a share of the maps made blank, as the pooling asks."""
    weight_B1HW, pooling = pooling_weight(spec, batch), spec.model.pooling
    if weight_B1HW is None or not isinstance(pooling, FigureGroundPooling) or not pooling.blank:
        return weight_B1HW
    blank_B = random_share(batch.index_B, step=step, share=pooling.blank, seed=seed)
    return weight_B1HW.masked_fill(blank_B[:, None, None, None], 1.0)


def own_losses(
    objectives: Sequence[StudentObjective], view: View, batch: Batch, *, supervision: Supervision
) -> dict[str, Tensor]:
    """The weighted losses that need no teacher."""
    losses = {}
    for objective in objectives:
        if isinstance(objective, Supervised):
            losses["supervised"] = objective.weight * supervised(
                view.outputs["logits"],
                batch.label_B,
                labelled_share=supervision.labelled_share,
                label_smoothing=objective.label_smoothing,
                log_prior_K=supervision.log_prior_K if objective.balance == "logit_adjusted" else None,
                tau=objective.tau,
            )
        elif isinstance(objective, MaskedPrior):
            outputs = view.outputs if view.hidden_outputs is None else view.hidden_outputs
            for name, weight in objective.targets.items():
                prediction_BCHW = outputs[f"prior.{name}"]
                grid = (prediction_BCHW.shape[2], prediction_BCHW.shape[3])
                target_BCHW = prior_target(batch.priors[name], grid)
                loss = masked_prior(prediction_BCHW, target_BCHW, view.mask_B1HW)
                losses[f"masked_prior.{name}"] = objective.weight * weight * loss
    stated = statement_losses(
        objectives,
        view.outputs,
        batch,
        statements=supervision.statements,
        labelled_share=supervision.labelled_share,
    )
    return losses | stated


def distillation_losses(
    objectives: Sequence[StudentObjective], outputs: Outputs, taught: Outputs, batch: Batch
) -> dict[str, Tensor]:
    """The weighted losses against the teacher's outputs, which carry no gradient."""
    losses = {}
    for objective in objectives:
        if isinstance(objective, LogitDistillation):
            loss = distil_logits(outputs["logits"], taught["logits"], temperature=objective.temperature)
            losses["logits"] = objective.weight * loss
        elif isinstance(objective, FeatureDistillation):
            loss = distil_embedding(outputs["to_teacher.embedding"], taught["embedding"])
            losses["features"] = objective.weight * loss
        elif isinstance(objective, PatchDistillation):
            weight_B1HW = patch_weight(
                saliency_B1HW=batch.priors["saliency"] if objective.saliency else None,
                edge_B1HW=batch.priors["edge"] if objective.edge else None,
                saliency=objective.saliency,
                edge=objective.edge,
            )
            loss = distil_patches(outputs["to_teacher.patch"], taught["patch"], weight_B1HW)
            losses["patches"] = objective.weight * loss
    return losses
