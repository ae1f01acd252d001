"""Settings of a network."""

from typing import Annotated, Any, Literal

from pydantic import Field

from dpkd.config import Config


class MeanPooling(Config):
    """The embedding is the mean of the patch features (or what the timm model's own head pools)."""

    kind: Literal["mean"] = "mean"


class FigureGroundPooling(Config):
    """The embedding is the mean of the patch features weighted by `S / (mean S + floor)`, S a prior map in [0, 1]."""

    kind: Literal["figure_ground"] = "figure_ground"
    prior: str = "saliency"
    floor: float = Field(0.05, gt=0)
    blank: float = Field(0.0, ge=0, le=1)
    """Share of training samples pooled plainly, as if their map were blank, so that the network also works without
    its map, which no exported timm model has."""


Pooling = Annotated[MeanPooling | FigureGroundPooling, Field(discriminator="kind")]


class ModelSettings(Config):
    """A timm model by name; `arguments` go to `timm.create_model` as they are."""

    name: str
    arguments: dict[str, Any] = {}
    weights: str | None = None
    """A local safetensors or PyTorch state dict to start from; none starts from scratch."""
    pretrained: bool = False
    """Start from timm's published weights (downloads them)."""
    pooling: Pooling = MeanPooling()


class NetworkSpec(Config):
    """All that a network is built from; `network.json` beside its weights holds it."""

    model: ModelSettings
    classes: tuple[str, ...]
    """Class names, in the order of the logits; empty gives no logits."""
    image_size: int = Field(ge=1)
    mean: tuple[float, float, float]
    """Channel means of the training images, RGB in 0..1."""
    std: tuple[float, float, float]
    targets: dict[str, int] = {}
    """Channels of each prior map to predict: one linear head each."""
    attributes: tuple[str, ...] = ()
    """Names of the attributes to predict from the embedding, in the order of the outputs; empty makes no head."""
    regions: tuple[str, ...] = ()
    """Names of the prior maps that regions are predicted after: one linear head each."""
    teacher_dim: int | None = None
    """Width of the teacher's embedding that `to_teacher` projects to; none makes no projections."""
    teacher_patch_dim: int | None = None
    """Width of the teacher's patch features where it is not `teacher_dim`."""
