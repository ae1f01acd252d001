"""The run of a training stage in one worker, and its training split."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from dpkd.data.attributes import score_weights
from dpkd.data.labels import Labels, class_counts, label_known, visible_labels
from dpkd.data.masks import visible_masks
from dpkd.data.settings import GLOBAL, AugmentSettings
from dpkd.data.shards import Dataset, Split
from dpkd.data.stream import ViewPlan
from dpkd.engine.imbalance import DEFERRED, Recipe, class_weights, recipe
from dpkd.engine.settings import TrainingSettings
from dpkd.engine.world import World
from dpkd.errors import UserError
from dpkd.objectives.base import VIEW_MAPS, ClassAttributes, Objective, Supervision
from dpkd.objectives.supervised import log_class_prior
from dpkd.priors.store import PriorSet, PriorSplit, fingerprints
from dpkd.run.folder import RunFolder
from dpkd.settings import DataSettings, Settings
from dpkd.stages.check_data import SplitCounts, attribute_table, measured_splits
from dpkd.stages.plan import dataset_url


@dataclass(frozen=True)
class Run:
    """The run of a training stage in one worker: its folder, ranks, settings and data."""

    folder: RunFolder
    world: World
    settings: Settings

    @staticmethod
    def open(settings: Settings, world: World, *, attempt: int | None = None) -> "Run":
        """The run of these settings; `attempt` is the number of the writing attempt, None for a reader."""
        folder = RunFolder(settings.run.dir, checkpoints=settings.run.checkpoints, attempt=attempt)
        return Run(folder, world, settings)

    @property
    def seed(self) -> int:
        """The seed of all random draws."""
        return self.settings.run.seed

    @property
    def data(self) -> DataSettings:
        """The settings of the images."""
        return self.settings.data

    @cached_property
    def dataset(self) -> Dataset:
        """The packed images."""
        return Dataset.open(dataset_url(self.folder, self.data))

    @cached_property
    def priors(self) -> PriorSet | None:
        """The prior maps, None without priors; raises `UserError` if the set has other priors than the settings."""
        prepare = self.settings.prepare
        if not prepare.chosen:
            return None
        priors = PriorSet.open(self.dataset.url, prepare.name)
        if priors.manifest.fingerprints != fingerprints(prepare.sealed().chosen):
            raise UserError(
                f"the prior set at {priors.url} was made with other settings than prepare.priors now has: run the "
                "prepare stage again (dpkd prepare)"
            )
        return priors

    def maps_of(self, split: str, names: Collection[str]) -> PriorSplit | None:
        """The stored prior maps of a split among `names`; None if there are none. Training computes the other maps."""
        if self.priors is None:
            return None
        stored = [name for name in sorted(names) if name in self.priors.channels or name not in VIEW_MAPS]
        return self.priors.split(split).only(stored) if stored else None

    def unreadable(self, split: str) -> NDArray[np.int64]:
        """Numbers of the samples of a split that `prepare` could not read, ascending; empty without prior maps."""
        return self.priors.unreadable(split) if self.priors is not None else np.empty(0, np.int64)

    def readable(self, split: str) -> NDArray[np.int64]:
        """Numbers of the other samples of the split, ascending."""
        return np.delete(np.arange(self.dataset.split(split).num_samples), self.unreadable(split))

    def unusable_masks(self, split: str) -> set[str]:
        """The keys of the samples of a split with a mask that `prepare` could not use."""
        return self.priors.split(split).bad_keys() if self.priors is not None else set()

    @cached_property
    def counts(self) -> dict[str, SplitCounts]:
        """The counts of the readable samples of each split."""
        counts = dict[str, SplitCounts]()
        for name in self.dataset.manifest.splits:
            info, label = self.dataset.split(name).info, self.dataset.split(name).labels[self.readable(name)]
            counts[name] = SplitCounts(len(label), class_counts(label, len(info.class_counts)), info.multi_label)
        return counts

    @cached_property
    def train_counts(self) -> NDArray[np.int64]:
        """Number of visible labels of each class of the data set in the training split."""
        split = self.dataset.split(self.data.train)
        unreadable, keys = self.unreadable(split.name), split.iter_keys()
        visible = visible_labels(split.labels, self.data.labels, keys=keys, seed=self.seed, unreadable=unreadable)
        return np.array(class_counts(visible, len(self.dataset.manifest.classes)))

    @property
    def measured_splits(self) -> tuple[str, ...]:
        """The evaluated splits that have a label."""
        return measured_splits(self.data, self.counts)

    @property
    def map_size(self) -> int:
        """Side of the prior maps of the global view."""
        return self.data.map_size or max(4, self.data.image_size // 4)

    def view_plans(self, names: Iterable[str], augment: AugmentSettings) -> dict[str, ViewPlan]:
        """The plan of each view among `names`, in the order of `data.views`."""
        plans = {}
        for name, view in self.data.views.items():
            size = view.size or self.data.image_size
            map_size = view.map_size or (self.map_size if name == GLOBAL else max(4, size // 4))
            scale = {} if view.crop_scale is None else {"crop_scale": view.crop_scale}
            plans[name] = ViewPlan(size, map_size, augment.model_copy(update=scale), count=view.count)
        return {name: plan for name, plan in plans.items() if name in names}

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
                f"micro-batches of {size}; set a multiple of {max(size, 1) * self.world.size}"
            )
        return size

    def micro_batches(self, training: TrainingSettings) -> int:
        """Number of micro-batches of one worker in a step."""
        return training.batch_size // (self.micro_batch_size(training) * self.world.size)


@dataclass(frozen=True)
class TrainingSet:
    """The training split with the labels visible to training, numbered by the classes of that split."""

    split: Split
    class_names: tuple[str, ...]
    label_N: Labels
    """-1 if the label is not visible or the sample cannot be read; else 0 where an image may have several."""
    unreadable: NDArray[np.int64]
    """Numbers of the samples that are never drawn, ascending."""
    mask_N: Labels
    """0 if the mask is visible to training, else -1."""
    label_NK: Labels | None = None
    """Where an image may have several labels: 1, 0, or -1 if it is unknown or not visible; of all classes."""

    @property
    def targets(self) -> dict[str, Labels]:
        """The labels of all samples by the name of the target."""
        if self.label_NK is None:
            return {"class": self.label_N, "mask": self.mask_N}
        return {"class": np.full_like(self.label_N, -1), "labels": self.label_NK, "mask": self.mask_N}

    @property
    def num_samples(self) -> int:
        """Number of samples in an epoch."""
        return self.split.num_samples - len(self.unreadable)

    @cached_property
    def label_counts(self) -> NDArray[np.int64]:
        """Number of visible labels of each class, or of images with each label [K]."""
        return np.array(class_counts(self.label_N if self.label_NK is None else self.label_NK, len(self.class_names)))

    def recipe(self, training: TrainingSettings) -> Recipe:
        """The recipe for rare classes."""
        return recipe(training.imbalance, training.sampling, self.label_counts)


def training_set(run: Run, training: TrainingSettings, objectives: Iterable[Objective]) -> TrainingSet:
    """Opens the training split and hides the labels that `data.labels` hides.

    Raises `UserError` if an objective needs labels and the split has no visible label.
    """
    split, unreadable = run.dataset.split(run.data.train), run.unreadable(run.data.train)
    classes = np.flatnonzero(split.info.class_counts)
    needs_labels = any({"class", "labels"} & {*objective.needs().targets} for objective in objectives)
    needs_labels = needs_labels or (training.labelled_share is not None and run.data.masks is None)
    if split.info.multi_label:
        label = split.label_NK[:, classes]
    else:
        number_of = np.full(len(run.dataset.manifest.classes) + 1, -1, split.label_N.dtype)  # the last one for label -1
        number_of[classes] = np.arange(len(classes))
        label = number_of[split.label_N]
    label = visible_labels(label, run.data.labels, keys=split.iter_keys(), seed=run.seed, unreadable=unreadable)
    if needs_labels and not (label >= 0).any():
        raise UserError(f"data.labels {run.data.labels!r} leaves no visible label in the split {split.name!r}")
    mask_N: Labels = np.broadcast_to(np.int8(-1), split.num_samples)  # takes no memory
    if run.data.masks is not None:
        unusable = run.unusable_masks(split.name)
        mask_N = visible_masks(split, run.data.masks, seed=run.seed, unreadable=unreadable, unusable=unusable)
        if not (mask_N >= 0).any():
            raise UserError(f"data.masks {run.data.masks!r} leaves no visible mask in the split {split.name!r}")
    names = tuple(run.dataset.manifest.classes[number] for number in classes)
    if split.info.multi_label:
        return TrainingSet(split, names, label_known(label), unreadable, mask_N, label)
    return TrainingSet(split, names, label, unreadable, mask_N)


def supervision(run: Run, data: TrainingSet, training: TrainingSettings) -> Supervision:
    """The supervision of the trained classes by labels and experts; raises `UserError` if the table does not fit."""
    device, table, attributes = run.world.device, attribute_table(run.data), None
    if table is not None:
        if not (data.label_N >= 0).any():
            raise UserError(
                f"data.attributes describes classes, and no label is visible in the split {data.split.name!r}: show "
                "some (data.labels), or remove the objective `attributes`"
            )
        value_KA = table.rows(data.class_names)
        arrays = (value_KA, *score_weights(value_KA))
        attributes = ClassAttributes(*(torch.from_numpy(array).to(device) for array in arrays))
    labelled_N = data.label_N >= 0
    chosen_N = labelled_N if run.data.masks is None else data.mask_N >= 0  # `labelled_share` is that of these samples
    share, chosen = (float(each_N.sum() / data.num_samples) for each_N in (labelled_N, chosen_N))
    if training.labelled_share is not None and chosen < 1:
        both, num_chosen = (labelled_N & chosen_N).sum(), chosen_N.sum()
        of_others = (labelled_N.sum() - both) / (data.num_samples - num_chosen)
        share = training.labelled_share * float(both / num_chosen) + (1 - training.labelled_share) * float(of_others)
        chosen = training.labelled_share
    log_prior_K, known_share_K = log_class_prior(torch.from_numpy(data.label_counts)), None
    if data.label_NK is not None:
        known_K, positive_K = (data.label_NK >= 0).sum(0), data.label_counts.clip(0.5)
        log_prior_K = torch.from_numpy(np.log(positive_K / (known_K - positive_K).clip(0.5))).float()
        known_share_K = torch.from_numpy(share * known_K / max(1, labelled_N.sum())).float().to(device)
    return Supervision(
        data.class_names,
        share,
        log_prior_K.to(device),
        attributes,
        masked_share=chosen,
        known_share_K=known_share_K,
        recipe=data.recipe(training).kind,
        class_weight_K=torch.from_numpy(class_weights(data.label_counts)).to(device),
        deferred_from=round(DEFERRED * training.num_steps(data.num_samples)),
    )
