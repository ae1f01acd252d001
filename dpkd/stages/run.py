"""The run that a training stage is part of, as one worker sees it, and its training split."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dpkd.data.labels import visible_labels
from dpkd.data.shards import Dataset, Split
from dpkd.engine.protocol import Engine
from dpkd.engine.settings import EngineSettings, TrainingSettings
from dpkd.engine.world import World
from dpkd.errors import UserError
from dpkd.log import EventLog
from dpkd.objectives.settings import VIEW_MAPS, StudentObjective, Supervised
from dpkd.objectives.supervised import log_class_prior
from dpkd.priors.store import PriorSet, PriorSplit, fingerprints
from dpkd.run.folder import RunFolder
from dpkd.settings import DataSettings, EvaluateSettings, PrepareSettings
from dpkd.train.statements import Statements
from dpkd.train.task import Supervision


class EngineFactory(Protocol):
    """Makes the engine that the settings name around a network."""

    def __call__(self, module: nn.Module, *, settings: EngineSettings, **arguments: Any) -> Engine:
        """See `dpkd.engine.torch_engine.TorchEngine` for the arguments."""


@dataclass(frozen=True)
class Run:
    """The run that a training stage is part of, as one worker sees it."""

    folder: RunFolder
    world: World
    seed: int
    data: DataSettings
    prepare: PrepareSettings
    evaluate: EvaluateSettings
    make_engine: EngineFactory

    @cached_property
    def events(self) -> EventLog:
        """Where what happens is written down; rank 0 alone does so."""
        return self.folder.event_log()

    @cached_property
    def dataset(self) -> Dataset:
        """The packed images."""
        return Dataset.open(dataset_url(self.folder, self.data))

    @cached_property
    def priors(self) -> PriorSet | None:
        """The prior maps, none where no prior is prepared; raises `UserError` where others stand than are asked for."""
        if not self.prepare.priors:
            return None
        priors = PriorSet.open(self.dataset.url, self.prepare.name)
        if priors.manifest.fingerprints != fingerprints(self.prepare.sealed().priors):
            raise UserError(
                f"the prior set at {priors.url} was made with other settings than prepare.priors now has: run the "
                "prepare stage again (dpkd prepare)"
            )
        return priors

    def maps_of(self, split: str, names: Collection[str]) -> PriorSplit | None:
        """The prior maps of a split by name, without those that training makes itself; none where none is left."""
        if self.priors is None:
            return None
        stored = [name for name in sorted(names) if name in self.priors.channels or name not in VIEW_MAPS]
        return self.priors.split(split).only(stored) if stored else None

    def unreadable(self, split: str) -> NDArray[np.int64]:
        """Numbers of the samples of a split that `prepare` could not read, ascending; none without prior maps."""
        return self.priors.unreadable(split) if self.priors is not None else np.empty(0, np.int64)

    def readable(self, split: str) -> NDArray[np.int64]:
        """Numbers of the other samples of the split, ascending."""
        return np.delete(np.arange(self.dataset.split(split).num_samples), self.unreadable(split))

    @property
    def map_size(self) -> int:
        """Side of the prior maps in a batch."""
        return self.data.map_size or max(4, self.data.image_size // 4)

    def precision(self, training: TrainingSettings) -> str:
        """`auto` is bf16 on a GPU and fp32 on a CPU."""
        if training.precision != "auto":
            return training.precision
        return "bf16" if self.world.device.type == "cuda" else "fp32"

    def micro_batch_size(self, training: TrainingSettings) -> int:
        """Images in one forward pass of one worker."""
        size = training.micro_batch_size or training.batch_size // self.world.size
        if size == 0 or training.batch_size % (size * self.world.size):
            raise UserError(
                f"training.batch_size {training.batch_size} does not divide among {self.world.size} workers in "
                f"micro-batches of {size}; take a multiple of {max(size, 1) * self.world.size}"
            )
        return size


@dataclass(frozen=True)
class TrainingSet:
    """The training split with the labels that training may see, numbered by the classes of that split."""

    split: Split
    class_names: tuple[str, ...]
    label_N: NDArray[np.int64]
    """-1 where training may not see it, or the sample cannot be read."""
    unreadable: NDArray[np.int64]
    """Numbers of the samples that are never drawn, ascending."""

    @property
    def num_samples(self) -> int:
        """Samples that are drawn in an epoch."""
        return self.split.num_samples - len(self.unreadable)

    @property
    def shard_sizes(self) -> list[int]:
        """Samples of each shard that are drawn."""
        lost = Counter(self.split.locate(i)[0] for i in self.unreadable.tolist())
        return [size - lost[shard] for shard, size in enumerate(self.split.shard_sizes)]

    def supervision(self, device: torch.device) -> Supervision:
        """Share of visible labels among the samples that are drawn, and the log frequency of each class among them."""
        share = float((self.label_N >= 0).sum() / self.num_samples)
        log_prior_K = log_class_prior(torch.from_numpy(self.label_N), len(self.class_names))
        return Supervision(share, log_prior_K.to(device), Statements(self.class_names))


def training_set(run: Run, training: TrainingSettings, objectives: Sequence[StudentObjective]) -> TrainingSet:
    """Opens the training split and hides the labels that `data.labels` hides.

    Raises `UserError` where the split has fewer samples than a batch, or where an objective needs labels and the split
    has fewer than two classes or no visible label. Samples that cannot be read do not count.
    """
    split, unreadable = run.dataset.split(run.data.train), run.unreadable(run.data.train)
    num_samples = split.num_samples - len(unreadable)
    if num_samples < training.batch_size:
        raise UserError(
            f"the split {split.name!r} has {num_samples} samples, fewer than one batch of "
            f"training.batch_size={training.batch_size}; lower it, or pack more images"
        )
    classes = np.unique(split.label_N[split.label_N >= 0])
    needs_labels = any(isinstance(objective, Supervised) for objective in objectives)
    if needs_labels and len(classes) < 2:
        names = [run.dataset.manifest.classes[label] for label in classes]
        raise UserError(
            f"the split {split.name!r} holds {len(classes)} labelled {'class' if len(classes) == 1 else 'classes'} "
            f"({', '.join(names) or 'none'}); training "
            "needs two or more: check the folder layout or the label column of data.source"
        )
    own_label_N = np.where(split.label_N < 0, -1, np.searchsorted(classes, split.label_N))
    label_N = visible_labels(own_label_N, run.data.labels, keys=split.keys, seed=run.seed, unreadable=unreadable)
    if needs_labels and not (label_N >= 0).any():
        raise UserError(f"data.labels {run.data.labels!r} leaves no visible label in the split {split.name!r}")
    return TrainingSet(split, tuple(run.dataset.manifest.classes[label] for label in classes), label_N, unreadable)


def dataset_url(folder: RunFolder, data: DataSettings) -> str:
    """Where the packed images stand."""
    return data.shards or str(folder.path / "shards")
