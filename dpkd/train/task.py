"""The losses of each network on a batch: networks trained in the same steps, and their teachers.

Axes: B sample, V views of one kind, C channel, H W height and width.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.profiler import record_function

from dpkd.data.augment import normalise
from dpkd.data.batch import Batch, View
from dpkd.data.settings import GLOBAL
from dpkd.data.stream import ViewPlan
from dpkd.engine.protocol import Engine
from dpkd.models.counts import count_flops
from dpkd.models.network import Network
from dpkd.models.settings import FigureGroundPooling, NetworkSpec
from dpkd.objectives.base import Context, DerivedView, Draw, Objective, Outputs, Supervision, losses_of, teacher_of
from dpkd.objectives.draws import random_share
from dpkd.objectives.hog import hog


class Predictor(Protocol):
    """A network that predicts without gradients, such as a frozen teacher."""

    @property
    def spec(self) -> NetworkSpec:
        """The specification that the network was built from."""

    def predict(self, *args: Any) -> dict[str, Tensor]:
        """The outputs for normalised images [B, 3, H, W] (and a weight map), without gradients, in evaluation mode."""


@dataclass(frozen=True)
class Learner:
    """One network in training, and its objectives."""

    engine: Engine
    network: Network
    objectives: Sequence[Objective]
    rate: Callable[[int], float]
    """The learning rate at a step, before layer-wise decay."""

    @property
    def spec(self) -> NetworkSpec:
        """The specification that the network was built from."""
        return self.network.spec

    def predict(self, *args: Any) -> dict[str, Tensor]:
        """The outputs without gradients, with the averaged weights if it has some; makes it a `Predictor`."""
        outputs: dict[str, Tensor] = self.engine.predict(*args)
        return outputs

    @property
    def views(self) -> frozenset[str]:
        """Names of the views that the network reads."""
        return frozenset({GLOBAL}.union(*(objective.needs().views for objective in self.objectives)))

    @property
    def derived(self) -> list[DerivedView]:
        """The views that its objectives derive from the global view, by name."""
        views = {view for objective in self.objectives for view in objective.needs().derived}
        return sorted(views, key=lambda view: view.name)


class Task:
    """Networks trained in the same steps, each with its objectives, and their teachers.

    A teacher is a `Predictor`, or the name of a learner: students then learn from the outputs of its training forward
    pass in the same step.
    """

    def __init__(
        self,
        learners: Mapping[str, Learner],
        *,
        teachers: Mapping[str, Predictor],
        live_teachers: Collection[str] = (),
        supervision: Supervision,
        seed: int,
    ) -> None:
        self.learners = dict(learners)
        self.engines: dict[str, Engine] = {name: learner.engine for name, learner in learners.items()}
        self.teachers, self.live_teachers = dict(teachers), frozenset(live_teachers)
        self.maps = frozenset().union(
            *(pooling_maps(network.spec) for network in (*learners.values(), *teachers.values())),
            *(objective.needs().maps for learner in learners.values() for objective in learner.objectives),
        )
        """Names of the prior maps that a batch must have."""
        self.views = frozenset().union(*(learner.views for learner in learners.values()))
        """Names of the views that a batch must have."""
        self._supervision, self._seed = supervision, seed
        names = [*self.teachers, *self.live_teachers]
        self._followed_views: dict[str, set[str]] = defaultdict(set)
        for learner in learners.values():
            for objective in learner.objectives:
                if objective.needs().teacher:  # an objective that names no teacher follows the only one
                    self._followed_views[teacher_of(objective) or names[0]].update(objective.needs().views)

    def losses(self, batch: Batch, *, step: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yields each network's name and its weighted losses by objective, each a mean over the micro-batch.

        A network runs forward when its losses are requested, so the backward pass of the previous network can free its
        graph first.
        """
        with record_function("dpkd: maps of views"):
            batch = with_view_maps(batch, self.maps)
        teacher_outputs: dict[str, Mapping[str, Outputs]] = {}
        for name, teacher in self.teachers.items():
            with record_function(f"dpkd: forward of {name}, frozen"):
                teacher_outputs[name] = {
                    view: teacher.predict(*network_inputs(teacher.spec, batch.views[view]))
                    for view in sorted(self._followed_views[name])
                }
        for name, learner in self.learners.items():
            with record_function(f"dpkd: forward of {name}"):
                outputs, facts = forward_views(learner, batch, step=step, seed=self._seed)
            with record_function(f"dpkd: losses of {name}"):
                context = Context(
                    batch, outputs, teacher_outputs, self._supervision, step=step, seed=self._seed, facts=facts
                )
                losses = losses_of(learner.objectives, context)
            yield name, losses
            if name in self.live_teachers:
                teacher_outputs[name] = {
                    view: {key: output.detach() for key, output in outputs[view].items()}
                    for view in self._followed_views[name]
                }

    def flops_per_image(self, views: Mapping[str, ViewPlan]) -> int:
        """Floating-point operations of a step for one image of the batch with these views.

        A network in training counts three times its forward passes, of derived views too; a teacher counts once.
        """
        views_of = [(3, learner.spec, sorted(learner.views)) for learner in self.learners.values()]
        views_of += [(1, teacher.spec, sorted(self._followed_views[name])) for name, teacher in self.teachers.items()]
        total = sum(
            times * views[view].count * count_flops(spec, image_size=views[view].size)
            for times, spec, names in views_of
            for view in names
        )
        derived = (
            sum(view.share for view in learner.derived) * count_flops(learner.spec)
            for learner in self.learners.values()
        )
        return total + round(3 * sum(derived))

    def learning_rate(self, name: str, *, step: int) -> float:
        """Learning rate of one network at a step, before layer-wise decay."""
        return self.learners[name].rate(step)


def with_view_maps(batch: Batch, names: Collection[str]) -> Batch:
    """The batch as new views, with the maps of `names` that are computed from them, if it lacks them."""
    lacks = "hog" in names and "hog" not in batch.views[GLOBAL].maps
    views = {
        name: View(view.image_BCHW, {**view.maps, "hog": hog(view.image_BCHW)} if lacks else view.maps)
        for name, view in batch.views.items()
    }
    return replace(batch, views=views)


def forward_views(
    learner: Learner, batch: Batch, *, step: int, seed: int
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Mapping[str, Tensor]]]:
    """Runs a network in training mode; returns its outputs by view, and the facts of each derived view.

    Derived views share the forward pass of the global view. A figure-ground network pools a share of the samples with
    equal weights.
    """
    outputs: dict[str, dict[str, Tensor]] = {}
    facts: dict[str, Mapping[str, Tensor]] = {}
    backbone, pooling = learner.network.backbone, learner.spec.model.pooling
    blank = pooling.blank if isinstance(pooling, FigureGroundPooling) else 0.0
    for name in sorted(learner.views):
        view = batch.views[name]
        image_BCHW, *weights = network_inputs(learner.spec, view)
        if blank:
            num_views = len(image_BCHW) // len(batch.index_B)
            blank_B = random_share(batch.index_B, step=step, share=blank, seed=seed).repeat(num_views)
            weights = [weight_B1HW.masked_fill(blank_B[:, None, None, None], 1.0) for weight_B1HW in weights]
        if name != GLOBAL or not learner.derived:
            outputs[name] = learner.engine.forward(image_BCHW, *weights)
            continue
        first = [part[: len(batch.index_B)] for part in (image_BCHW, *weights)]
        draw = Draw(batch.index_B, step=step, seed=seed, grid=backbone.grid)
        derived = {view.name: view.derive(first, draw) for view in learner.derived}
        facts |= {key: view.facts for key, view in derived.items()}
        together = [[image_BCHW, *weights], *(view.inputs for view in derived.values())]
        sizes = [len(inputs[0]) for inputs in together]
        mixes = [(sum(sizes[:row]), view.mix) for row, view in enumerate(derived.values(), start=1) if view.mix]
        with backbone.mixing(mixes):
            joined = learner.engine.forward(*(torch.cat(parts) for parts in zip(*together, strict=True)))
        parts = {key: output.split(sizes) for key, output in joined.items()}
        outputs |= {key: {out: parts[out][row] for out in parts} for row, key in enumerate([name, *derived])}
    return outputs, facts


def network_inputs(spec: NetworkSpec, view: View) -> list[Tensor]:
    """The network's inputs from a view: normalised images, and the map that weighs patches in its pooling, if any.

    An unknown map weighs all patches equally. With `control: shuffle` it is the map of the previous image.
    """
    key = (spec.mean, spec.std)
    if key not in view.normalised:
        view.normalised[key] = normalise(view.image_BCHW, mean=spec.mean, std=spec.std)
    weights = [view.maps[name].nan_to_num(nan=1.0) for name in pooling_maps(spec)]
    pooling = spec.model.pooling
    if isinstance(pooling, FigureGroundPooling) and pooling.control == "shuffle":
        weights = [weight_B1HW.roll(1, dims=0) for weight_B1HW in weights]
    return [view.normalised[key], *weights]


def pooling_maps(spec: NetworkSpec) -> frozenset[str]:
    """Name of the prior map that the network's pooling reads, if it reads one."""
    pooling = spec.model.pooling
    return frozenset({pooling.prior} if isinstance(pooling, FigureGroundPooling) else ())
