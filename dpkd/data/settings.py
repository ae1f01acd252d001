"""Settings of the data room: sources, splits, views and loading of images."""

import re
from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from dpkd.config import TAKES_TEXT, Config, PathText


class FolderSource(Config):
    """Images in folders: `<split>/<class>/*`, `<class>/*`, or flat without labels, depending on the depth."""

    kind: Literal["folder"] = "folder"
    path: PathText


class TableSource(Config):
    """A CSV, JSONL or Parquet file with one row a sample; paths are relative to the table."""

    kind: Literal["table"] = "table"
    path: PathText
    path_column: str = "path"
    label_column: str | None = None
    """One class an image."""
    label_columns: tuple[str, ...] = ()
    """Several labels an image, a column each: 1, 0, empty for unknown, or -1 for uncertain (as in CheXpert)."""
    labels_column: str | None = None
    """Several labels an image in one cell, with `|` between them; an image with an empty cell has no known label."""
    uncertain: Literal["unknown", "positive", "negative"] = "unknown"
    """What -1 in `label_columns` means."""
    split_column: str | None = None
    group_column: str | None = None
    mask_column: str | None = None
    attribute_columns: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _one_kind_of_label(self) -> "TableSource":
        kinds = ("label_column", "label_columns", "labels_column")
        if len(given := [kind for kind in kinds if getattr(self, kind)]) > 1:
            raise ValueError(f"{' and '.join(given)} are given: keep one of them")
        if twice := [name for name, count in Counter(self.label_columns).items() if count > 1]:
            raise ValueError(f"label_columns names {twice[0]!r} twice")
        return self

    @property
    def multi_label(self) -> bool:
        """True if an image may have several labels."""
        return bool(self.label_columns or self.labels_column)


class ShardSource(Config):
    """Existing WebDataset tars: a folder of them or a pattern with braces, local or any fsspec URL."""

    kind: Literal["shards"] = "shards"
    path: PathText


Source = Annotated[FolderSource | TableSource | ShardSource, Field(discriminator="kind")]


def _source_of_path(value: Any) -> Any:
    """Settings of the source for a plain path or URL, by its extension."""
    if not isinstance(value, str):
        return value
    if re.search(r"\.(csv|tsv|jsonl|parquet)(\?.*)?$", value):
        return {"kind": "table", "path": value}
    return {"kind": "shards" if value.endswith(".tar") else "folder", "path": value}


SourceOrPath = Annotated[Source, BeforeValidator(_source_of_path, json_schema_input_type=str | Source), TAKES_TEXT]
"""Settings of a source, or only its path or URL."""


class GivenSplits(Config):
    """The splits named by the source (top folder, column, shard name)."""

    kind: Literal["given"] = "given"


class FractionSplits(Config):
    """Splits by share, drawn by group, stratified by class: `{train: 0.8, val: 0.1, test: 0.1}`.

    The shares are of the labelled samples, and the others train; if none is labelled, they are of all samples.
    """

    kind: Literal["fraction"] = "fraction"
    fractions: dict[str, float]


class ClassSplits(Config):
    """Splits by class, for few-shot learning: a number of classes or class names for each split."""

    kind: Literal["class"] = "class"
    classes: dict[str, int | tuple[str, ...]]


class FileSplits(Config):
    """Splits by text files; each line is a sample path (relative to the source) or a key."""

    kind: Literal["file"] = "file"
    files: dict[str, PathText]


Splits = Annotated[GivenSplits | FractionSplits | ClassSplits | FileSplits, Field(discriminator="kind")]


class Window(Config):
    """The values for black and white in images of more than 8 bits, signed numbers or floats."""

    low: float = Field(allow_inf_nan=False)
    high: float = Field(allow_inf_nan=False)

    @model_validator(mode="after")
    def _in_order(self) -> "Window":
        if self.low >= self.high:
            raise ValueError(f"low={self.low:g} must be less than high={self.high:g}")
        return self


class AllLabels(Config):
    """Every label on disk is visible to training."""

    kind: Literal["all"] = "all"


class LabelsPerClass(Config):
    """At most `count` labels of each class are visible; the other samples train without a label."""

    kind: Literal["per_class"] = "per_class"
    count: int = Field(ge=1)


class LabelFraction(Config):
    """This share of each class's labels is visible, at least one a class."""

    kind: Literal["fraction"] = "fraction"
    fraction: float = Field(gt=0, le=1)


class ListedLabels(Config):
    """Only the labels of the samples whose keys this text file lists are visible."""

    kind: Literal["listed"] = "listed"
    path: PathText


class CountedLabels(Config):
    """This number of labels is visible, of whatever class."""

    kind: Literal["count"] = "count"
    count: int = Field(ge=1)


VisibleLabels = Annotated[AllLabels | LabelsPerClass | LabelFraction | ListedLabels, Field(discriminator="kind")]


class MaskFormat(Config):
    """The meaning of the masks `<stem>.mask.png`; it is declared and never guessed."""

    kind: Literal["figure_ground", "classes", "instances"]
    """Pixels above 0 are figure; the value is the number of a class; or the value is the number of an object.

    Of `instances` figure and ground are learned. `<stem>.instances.png` is a mask too.
    """
    classes: tuple[str, ...] = ()
    """Names of the values 0, 1, … of `kind: classes`."""
    ignore: int | None = 255
    """The value of pixels without a class; only for `kind: classes`."""
    stride: int = Field(2, ge=1)
    """Side in pixels of a cell of the maps for training."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the classes of pixels."""
        return self.classes if self.kind == "classes" else ("ground", "figure")

    @model_validator(mode="after")
    def _has_classes(self) -> "MaskFormat":
        if self.kind == "classes" and not 2 <= len(self.classes) <= 255:
            raise ValueError("kind: classes needs the names of the values 0, 1, …: set classes: [background, …]")
        if self.kind != "classes" and self.classes:
            raise ValueError(f"kind: {self.kind} has the classes ground and figure: remove classes, or set its kind")
        return self


class MaskSettings(MaskFormat):
    """The masks of the images: what they mean, which of them training sees, and how large images are segmented."""

    visible: Annotated[
        AllLabels | CountedLabels | LabelFraction | ListedLabels,
        Field(discriminator="kind"),
    ] = AllLabels()
    """The masks that training sees; val and test are measured with all of theirs."""
    tile: int | None = Field(None, ge=16)
    """Side in image pixels of the square tiles in which an image is segmented; its shorter side by default."""


class BackgroundSettings(Config):
    """Replaces the ground of images by that of other images, by a map of figure and ground."""

    prior: str = "saliency"
    """A prior map with one channel of amounts: 1 for figure."""
    share: float = Field(0.5, gt=0, le=1)
    """Share of the images."""
    control: Literal["none", "shuffle"] = "none"
    """`shuffle` takes the map of another image: a control experiment."""


class AugmentSettings(Config):
    """Random views: a resized crop, a flip, and a colour change; prior maps follow the crop and the flip."""

    crop_scale: tuple[float, float] = (0.35, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 1.3333)
    flip: float = Field(0.5, ge=0, le=1)
    brightness: float = Field(0.4, ge=0)
    contrast: float = Field(0.4, ge=0)
    saturation: float = Field(0.4, ge=0)
    background: BackgroundSettings | None = None

    @property
    def maps(self) -> frozenset[str]:
        """Names of the prior maps that it reads."""
        return frozenset() if self.background is None else frozenset({self.background.prior})


GLOBAL = "global"
"""The view that every batch has."""


class ViewSettings(Config):
    """One kind of view of each image: number, size and crop."""

    count: int = Field(1, ge=1)
    """Number of views for each image."""
    size: int | None = Field(None, ge=8)
    """Side in pixels; `data.image_size` by default."""
    map_size: int | None = Field(None, ge=4)
    """Side of the prior maps; by default a quarter of `size`, and `data.map_size` for the global view."""
    crop_scale: tuple[float, float] | None = None
    """Range of the share of the image area in a crop; that of `augment` by default."""


class LoaderSettings(Config):
    """Worker processes that read and decode ahead of training; 0 loads in the training process."""

    workers: int = Field(1, ge=0)
    prefetch: int = Field(4, ge=1)
    block_shards: int = Field(8, ge=1)
    """Shards shuffled together: a larger block mixes better, a smaller block streams remote shards better."""
    cache_gb: float = Field(0.0, ge=0)
    """Memory of each rank for decoded images, in 10^9 bytes: they are decoded once, until it is full."""
