"""Checks whether the splits of a data set fit the settings, from the counts of their samples; loads no heavy package.

The counts come from the source's listing before any image is decoded, from the manifest of a packed data set, or from a
prepared one, without its unreadable samples.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dpkd.data.attributes import AttributeTable, read_attributes
from dpkd.data.shards import Dataset, SplitInfo
from dpkd.engine.settings import TrainingSettings
from dpkd.errors import UserError, did_you_mean
from dpkd.evaluation.few_shot import drawable_classes
from dpkd.objectives.base import Objective
from dpkd.settings import DataSettings, Settings
from dpkd.stages.baselines import baselines

MAX_NAMED = 5
"""Number of classes in an error message."""


class SplitCounts(NamedTuple):
    """Numbers of samples of a split: in all, and of each class of the data set."""

    num_samples: int
    class_counts: Sequence[int]
    multi_label: bool = False
    """True if an image may have several labels: the classes."""


Counts = Mapping[str, SplitCounts | SplitInfo]
"""The counts of each split."""


def attribute_table(data: DataSettings) -> AttributeTable | None:
    """The table of `data.attributes`, or None; raises `UserError` for a faulty table."""
    return None if data.attributes is None else read_attributes(data.attributes)


def trained_classes(dataset: Dataset, data: DataSettings) -> list[str]:
    """Classes with labelled samples in the training split, in the data set's order."""
    counts = dataset.split(data.train).info.class_counts
    return [name for name, count in zip(dataset.manifest.classes, counts, strict=True) if count]


def measured_splits(data: DataSettings, counts: Counts) -> tuple[str, ...]:
    """The evaluated splits that have a label; nothing can be measured on the others."""
    return tuple(name for name in data.evaluated_splits if any(counts[name].class_counts))


def check_splits(
    settings: Settings,
    classes: Sequence[str],
    counts: Counts,
    *,
    place: str,
    trainings: Mapping[str, TrainingSettings],
) -> None:
    """Raises `UserError` with the key of a split that is missing at `place`, or of a class that is not trained.

    With `trainings`, by their key, also of a batch, of labels or of episodes for which a split is too small.
    """
    data = settings.data
    for role in ("train", "val", "test"):
        name = getattr(data, role)
        if name is not None and name not in counts:
            ways = f"name one of them, {'' if role == 'train' else f'set data.{role}=null, '}or make it by data.splits"
            hint, known = did_you_mean(name, counts), ", ".join(counts)
            raise UserError(f"data.{role}={name!r} is no split of {place}{hint}; it has: {known}. {ways.capitalize()}")
    train = counts[data.train]
    trained = [name for name, count in zip(classes, train.class_counts, strict=True) if count]
    table = attribute_table(data)
    if table is not None:
        table.rows(trained)
    if train.multi_label and data.masks is not None:
        raise UserError(
            f"data.masks is set, and images of {place} may have several labels: their masks would not be measured; "
            "set data.masks=null, or leave out the labels"
        )
    _check_objectives(settings, train, trained=trained, place=place)
    for key, training in trainings.items():
        _check_training(key, training, settings=settings, train=train, trained=trained)
    episodes = settings.evaluate.episodes if settings.evaluate is not None else None
    if episodes is not None and trainings and not train.multi_label:
        for name in measured_splits(data, counts):
            drawable_classes(np.array(counts[name].class_counts), episodes, split=name)


def _check_objectives(
    settings: Settings, train: SplitCounts | SplitInfo, *, trained: Sequence[str], place: str
) -> None:
    """Raises `UserError` for an objective, also of a baseline, that does not fit the labels or masks of the images."""
    masks, of_networks = settings.data.masks, list[tuple[str, Objective]](settings.objectives.items())
    for name, baseline in baselines(settings).items():
        of_networks += ((f"the baseline {name}", objective) for objective in baseline.settings.objectives)
    for key, objective in of_networks:
        needs, kind = objective.needs(), f"{key} of kind {objective.kind!r}"
        if train.multi_label and (needs.one_class or {"class", "attributes"} & {*needs.targets}):
            fitting = "multi_label_logits" if needs.teacher else "multi_label"
            raise UserError(
                f"{kind} learns one class an image, and images of {place} may have several labels: use the kind "
                f"{fitting!r}, or remove it"
            )
        if "labels" in needs.targets and not train.multi_label:
            raise UserError(
                f"{kind} learns several labels an image, and images of {place} have one class: use the kind "
                "'supervised', or give data.source.label_columns or labels_column"
            )
        if objective.kind == "mask_saliency" and masks is not None and len(masks.names) != 2:
            raise UserError(
                f"{kind} tells figure from ground, and data.masks has {len(masks.names)} classes: remove it"
            )
        for field, names in needs.classes.items():
            for name in names:
                if name not in trained:
                    known = ", ".join(trained[:MAX_NAMED]) or "no label"
                    raise UserError(
                        f"{key}.{field} names {name!r}, of which the split {settings.data.train!r} has no sample"
                        f"{did_you_mean(name, trained) or f' (it has: {known})'}: correct it"
                    )


def _check_training(
    key: str, training: TrainingSettings, *, settings: Settings, train: SplitCounts | SplitInfo, trained: Sequence[str]
) -> None:
    """Raises `UserError` if the training split has fewer samples than a batch, or fewer classes than needed."""
    name = settings.data.train
    if train.num_samples < training.batch_size:
        raise UserError(
            f"the split {name!r} has {train.num_samples} samples, fewer than one batch of {key}.batch_size="
            f"{training.batch_size}; lower it, or pack more images"
        )
    of_classes = {"class_aware", "deferred"} & {training.sampling, training.imbalance}
    if train.multi_label and of_classes:
        raise UserError(
            f"{key} has {of_classes.pop()!r}, which needs one class an image, and images of {name!r} may have several "
            "labels: use imbalance=logit_adjusted"
        )
    by_labels = training.labelled_share is not None and settings.data.masks is None
    needing = [f"{key}.labelled_share"] if by_labels else []
    of_labels = (
        other for other, objective in settings.objectives.items() if {"class", "labels"} & {*objective.needs().targets}
    )
    needing += (other for other in of_labels if other.startswith(key.removesuffix("training")))
    if needing and len(trained) < 2:
        num_classes = f"{len(trained)} labelled {'class' if len(trained) == 1 else 'classes'}"
        raise UserError(
            f"the split {name!r} holds {num_classes} ({', '.join(trained) or 'none'}), and {needing[0]} needs two: "
            "check the folders or the labels of data.source, or remove it"
        )
