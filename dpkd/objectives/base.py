"""The interface of objectives: frozen settings that declare their needs and compute a loss.

Axes: B sample, C channel, H W height and width, K class, A attribute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol

from pydantic import Field

from dpkd.config import Config
from dpkd.data.settings import GLOBAL

if TYPE_CHECKING:
    from torch import Tensor

    from dpkd.data.batch import Batch
    from dpkd.models.backbone import LayerMix

VIEW_MAPS = {"hog": 9}
"""Channels of the maps that training computes from the view if no prior set has them."""

Weight = Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class Head:
    """A linear head that an objective adds to the network: on the embedding, or on each patch as a 1x1 convolution."""

    reads: str
    """`embedding`, `patch`, `layer-<index>`, or `pyramid-<stride>`: layers of this stride and more."""
    width: int | str
    """Number of outputs, or its source: `map.<name>` (channels), `attributes`, `classes+1`, `masks`, `teacher.…`."""
    hidden: int | None = None
    """With a hidden width, the head is an MLP: layer norm, linear, GELU, linear. A pyramid has such channels."""


@dataclass(frozen=True)
class Draw:
    """Where a derived view is drawn: its random draws depend on the seed, the step and the samples alone."""

    index_B: Tensor
    """Samples of the split."""
    step: int
    seed: int
    grid: tuple[int, int]
    """Patches of the network's input, (rows, columns)."""

    def first(self, share: float) -> Tensor:
        """The samples of the first images of the micro-batch, R, at least one."""
        return self.index_B[: max(1, round(share * len(self.index_B)))]


@dataclass(frozen=True)
class Derived:
    """The inputs of one network for a derived view: R rows, which are the first of the micro-batch."""

    inputs: Sequence[Tensor]
    """Normalised images R3HW, and the map that weighs patches R1hw if the network reads one."""
    facts: Mapping[str, Tensor] = field(default_factory=dict)
    """What the losses must know of this view, such as the hidden patches."""
    mix: LayerMix | None = None


class DerivedView(Protocol):
    """A further view of the images, made on the training device from the global view; equal ones are made once."""

    share: float
    """The share of the micro-batch's images that it has."""

    @property
    def name(self) -> str:
        """The name under which its outputs are found."""
        return repr(self)

    def derive(self, inputs: Sequence[Tensor], draw: Draw) -> Derived:
        """The view of a network's inputs for the global view: normalised images B3HW, and perhaps a map B1hw."""


@dataclass(frozen=True)
class Needs:
    """The needs of an objective; they depend only on its settings."""

    student: tuple[str, ...] = ()
    """Outputs of the network: `embedding`, `patch`, `logits`."""
    heads: Mapping[str, Head] = field(default_factory=dict)
    """Additional outputs by name: each is a head of the network."""
    teacher: tuple[str, ...] = ()
    """Outputs of the objective's teacher: those of `student`, `patch_logits`, and `layer-<index>` of timm."""
    maps: tuple[str, ...] = ()
    """Prior maps of the batch."""
    amounts: tuple[str, ...] = ()
    """The maps that must have one channel of amounts."""
    views: tuple[str, ...] = (GLOBAL,)
    """Views of each image."""
    num_views: int = 1
    """Smallest number of views of each kind."""
    derived: tuple[DerivedView, ...] = ()
    """Further views, made from the global view during training."""
    targets: tuple[str, ...] = ()
    """Required knowledge of samples: `class` (a visible label), `labels` (several), `attributes` (a table), `mask`."""
    one_class: bool = False
    """True if its classes exclude one another, so that an image has one."""
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Classes that need training samples, by the settings key that lists them."""
    own_colours: str | None = None
    """The setting that depends on image colours, so that augmentation must not change them."""

    @property
    def priors(self) -> tuple[str, ...]:
        """The maps that are prior knowledge, and no masks to learn."""
        return tuple(name for name in self.maps if name != "mask")


@dataclass(frozen=True)
class ClassAttributes:
    """The attributes of the trained classes, in the order of the labels."""

    value_KA: Tensor
    """NaN if unknown."""
    weight_KA: Tensor
    bias_K: Tensor
    """With `weight_KA`: the scores of classes from predicted attributes (`dpkd.data.attributes.score_weights`)."""


@dataclass(frozen=True)
class Supervision:
    """Statistics of the training split's visible labels, and the expert's table."""

    class_names: tuple[str, ...]
    """In the order of the labels."""
    labelled_share: float
    """Share of labelled samples among the drawn samples."""
    log_prior_K: Tensor
    """Logarithm of each class's share of the visible labels; where an image may have several, of each one's odds."""
    attributes: ClassAttributes | None = None
    recipe: str = "none"
    """The kind of `dpkd.engine.imbalance.Recipe`, for objectives with `balance: auto`."""
    class_weight_K: Tensor | None = None
    """Weights of rare classes, which count from the step `deferred_from` on."""
    deferred_from: int = 0
    known_share_K: Tensor | None = None
    """Where an image may have several labels: the share of drawn samples of which each label is known."""
    masked_share: float = 1.0
    """Share of samples with a visible mask among the drawn samples."""


Outputs = Mapping[str, "Tensor"]
"""A network's outputs by name."""


@dataclass(frozen=True)
class Context:
    """The inputs of the losses of one network, on one micro-batch.

    The methods return outputs, maps and images of each image's first view of the kind, unless all are asked for.
    """

    batch: Batch
    outputs: Mapping[str, Outputs]
    """The network's outputs by view."""
    teachers: Mapping[str, Mapping[str, Outputs]]
    """The outputs of each teacher by view, without gradients."""
    supervision: Supervision
    step: int
    seed: int
    facts: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """The facts of each derived view."""
    teacher_name: str | None = None
    """The teacher of the current objective."""

    def student(self, output: str, *, view: str = GLOBAL, all_views: bool = False) -> Tensor:
        """An output of the trained network; with `all_views`, of all V views of the kind, as V blocks of B."""
        tensor = self.outputs[view][output]
        return tensor if all_views else self._first(tensor)

    def teacher(self, output: str, *, view: str = GLOBAL, average_views: bool = False) -> Tensor:
        """An output of the objective's teacher; with `average_views`, of all V views of the kind, as V blocks of B.

        Each is then half the output of its view and half the mean over the views of its image.
        """
        assert self.teacher_name is not None, "settings require a teacher"
        tensor = self.teachers[self.teacher_name][view][output]
        if not average_views:
            return self._first(tensor)
        view_VB = tensor.unflatten(0, (-1, len(self.batch.index_B)))
        return ((view_VB + view_VB.mean(0)) / 2).flatten(0, 1)

    def map(self, name: str, *, view: str = GLOBAL) -> Tensor:
        """A prior map, BCHW float32; NaN if unknown."""
        return self._first(self.batch.views[view].maps[name])

    def image(self, *, view: str = GLOBAL) -> Tensor:
        """The images, BCHW uint8."""
        return self._first(self.batch.views[view].image_BCHW)

    def _first(self, tensor: Tensor) -> Tensor:
        return tensor[: len(self.batch.index_B)]


class Objective(Config):
    """One term of a network's loss: the common settings, and two methods."""

    kind: str
    name: str | None = Field(None, pattern=r"^\w[\w.-]*$")
    """Name of the objective in TensorBoard and messages; the kind by default."""
    weight: Weight = 1.0
    control: Literal["none", "shuffle"] = "none"
    """`shuffle` swaps the prior maps between images of the batch: a control experiment."""
    map_free: ClassVar[Mapping[str, Any]] = {}
    """Settings with which it reads no map, if there are some."""

    def needs(self) -> Needs:
        """The needs from the network, the batch and a teacher."""
        raise NotImplementedError

    def without_maps(self) -> Objective | None:
        """The same objective without prior maps, to measure what they bring; None if it is nothing without them."""
        if not self.needs().priors:
            return self
        plain = self.model_copy(update={**self.map_free, "control": "none"})
        return None if plain.needs().priors else plain

    def loss(self, context: Context) -> Tensor | Mapping[str, Tensor]:
        """The weighted loss, a scalar mean over the micro-batch; or several losses by name, which are summed."""
        raise NotImplementedError


class Distillation(Objective):
    """An objective with a teacher."""

    teacher: str | None = None
    """Name of the teacher; may be None if the run has only one."""


def teacher_of(objective: Objective) -> str | None:
    """The objective's setting `teacher`, None without one."""
    return objective.teacher if isinstance(objective, Distillation) else None


def named(objectives: Sequence[Objective]) -> dict[str, Objective]:
    """The objectives under unique names, in order: the second `features` is `features-2`."""
    by_name: dict[str, Objective] = {}
    for objective in objectives:
        name = base = objective.name or objective.kind.rpartition(":")[2]
        number = 1
        while name in by_name:
            number += 1
            name = f"{base}-{number}"
        by_name[name] = objective
    return by_name


def losses_of(objectives: Sequence[Objective], context: Context) -> dict[str, Tensor]:
    """The weighted losses of all objectives of a network, by the names of `named`; parts as `<name>.<part>`.

    Each objective reads the outputs of its teacher and, with `control: shuffle`, the maps of other images.
    """
    losses: dict[str, Tensor] = {}
    only_teacher = next(iter(context.teachers)) if len(context.teachers) == 1 else None
    for name, objective in named(objectives).items():
        batch = context.batch.with_shifted_maps() if objective.control == "shuffle" else context.batch
        loss = objective.loss(replace(context, batch=batch, teacher_name=teacher_of(objective) or only_teacher))
        if isinstance(loss, Mapping):
            losses |= {f"{name}.{part}": value for part, value in loss.items()}
        else:
            losses[name] = loss
    return losses
