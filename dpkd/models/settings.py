"""Settings of a network."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from dpkd.config import TAKES_TEXT, Config


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
    """A timm model by name; `arguments` go to `timm.create_model` as they are. A plain text is the name."""

    name: str
    arguments: dict[str, Any] = {}
    pretrained: bool = False
    """Start from timm's published weights (downloads them)."""
    pooling: Pooling = MeanPooling()


def _named_model(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


Model = Annotated[ModelSettings, BeforeValidator(_named_model), TAKES_TEXT]
"""Settings of a model, or its name alone."""


class HeadSpec(Config):
    """A linear head: on the embedding, or on each patch as a 1x1 convolution."""

    reads: Literal["embedding", "patch"]
    width: int = Field(ge=1)


class NetworkSpec(Config):
    """All that a network is built from; `network.json` beside its weights holds it."""

    model: ModelSettings
    classes: tuple[str, ...]
    """Class names, in the order of the logits; empty gives no logits."""
    image_size: int = Field(ge=1)
    mean: tuple[float, float, float]
    """Channel means of the training images, RGB in 0..1."""
    std: tuple[float, float, float]
    heads: dict[str, HeadSpec] = {}
    """By the name of their output; the order is that in which weights are drawn."""
    attributes: tuple[str, ...] = ()
    """Names of the attributes that the head `attributes` predicts, in the order of its outputs."""
