"""Settings of a network."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from dpkd.config import TAKES_TEXT, Config


class MeanPooling(Config):
    """The embedding is the mean of the patch features, or the pooling of the timm model."""

    kind: Literal["mean"] = "mean"


class FigureGroundPooling(Config):
    """The embedding is the mean of the patch features weighted by `S / (mean S + floor)`; S: a prior map in [0, 1]."""

    kind: Literal["figure_ground"] = "figure_ground"
    prior: str = "saliency"
    floor: float = Field(0.05, gt=0)
    blank: float = Field(0.0, ge=0, le=1)
    """Share of training samples with plain pooling, as with a blank map, so that the network also works without the
    map. An exported timm model has no map."""
    control: Literal["none", "shuffle"] = "none"
    """`shuffle` pools each image by the map of another: a control experiment."""


Pooling = Annotated[MeanPooling | FigureGroundPooling, Field(discriminator="kind")]


class ModelSettings(Config):
    """A timm model by name; `arguments` are passed to `timm.create_model`. A plain text is the name."""

    name: str
    arguments: dict[str, Any] = {}
    pretrained: bool = False
    """Download timm's published weights and start from them."""
    pooling: Pooling = MeanPooling()


def _named_model(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


Model = Annotated[ModelSettings, BeforeValidator(_named_model, json_schema_input_type=str | ModelSettings), TAKES_TEXT]
"""Settings of a model, or only its name."""


class HeadSpec(Config):
    """A linear head or an MLP: on the embedding, or on each patch of the last features or of a layer of timm.

    `pyramid-S` reads a layer of each scale from a stride of S pixels on.
    """

    reads: str = Field(pattern=r"^(embedding|patch|(layer|pyramid)-\d+)$")
    width: int = Field(ge=1)
    hidden: int | None = Field(None, ge=1)
    """Width of the hidden layer of an MLP; None for a linear head."""


class NetworkSpec(Config):
    """The complete definition of a network; stored in `network.json` beside the weights."""

    model: ModelSettings
    classes: tuple[str, ...]
    """Class names, in the order of the logits; if empty, the network has no logits."""
    multi_label: bool = False
    """True if an image may have several of the classes: a logit is that of one label against its absence."""
    image_size: int = Field(ge=1)
    mean: tuple[float, float, float]
    """Channel means of the training images, RGB in 0..1."""
    std: tuple[float, float, float]
    heads: dict[str, HeadSpec] = {}
    """By output name; the weights are drawn in this order."""
    attributes: tuple[str, ...] = ()
    """Attribute names, in the order of the outputs of the head `attributes`."""
