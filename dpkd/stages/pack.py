"""Pack: writes a source of images as shards and a manifest.

    source ──find──▶ records ──assign──▶ splits ──plan──▶ jobs ──Pool──▶ tar, index ──▶ dataset.json

The plan is a pure function of the source and the settings, and each shard a pure function of its part of the plan. So
the bytes do not depend on the number of workers or on interruptions. Finished shards are checked and kept.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from dpkd.data import sources
from dpkd.data.labels import LABELS_ENDING, Labels, class_counts, label_known, visible_labels, write_labels
from dpkd.data.settings import FileSplits, Window
from dpkd.data.shards import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    Dataset,
    Manifest,
    ShardIndex,
    SplitInfo,
    given_name,
    index_name,
)
from dpkd.data.sources.records import Record, SourceContents, describe_counts, describe_source, keys_of, sorted_classes
from dpkd.data.splits import assign, draw, group_by_pattern
from dpkd.data.text import read_lines
from dpkd.data.writer import Planned, ShardJob, write_shard
from dpkd.errors import UserError
from dpkd.io import storage
from dpkd.launch.pool import Pool
from dpkd.log import logger
from dpkd.report.quarantine import Quarantine
from dpkd.settings import DataSettings, Settings
from dpkd.stages.check_data import SplitCounts, check_splits
from dpkd.stages.plan import left_trainings
from dpkd.stages.prepare import refuse_missing_experts

STAGE = "pack"
PACKING_NAME = "packing.json"
"""A file that exists during packing, and marks the unfinished shards in its folder as shards of dpkd."""


@dataclass(frozen=True)
class Plan:
    """The shards to write: a pure function of the source and the settings."""

    classes: tuple[str, ...]
    jobs: tuple[ShardJob, ...]
    bad: tuple[tuple[str, str], ...]
    num_left_out: int
    made_from: dict[str, str]

    @property
    def counts(self) -> dict[str, SplitCounts]:
        """The counts of the samples of each split, as long as all of them can be used."""
        counts = dict[str, SplitCounts]()
        for split in dict.fromkeys(job.split for job in self.jobs):
            label = self.labels(split)
            counts[split] = SplitCounts(len(label), class_counts(label, len(self.classes)), self.multi_label)
        return counts

    @property
    def multi_label(self) -> bool:
        """True if an image may have several labels: the classes."""
        return any(isinstance(sample.label, tuple) for job in self.jobs for sample in job.samples[:1])

    def labels(self, split: str) -> Labels:
        """The labels of the samples of a split, N or NK."""
        return np.array([sample.label for job in self.jobs if job.split == split for sample in job.samples])


def pack(
    data: DataSettings,
    destination: str,
    *,
    seed: int,
    pool: Pool,
    quarantine: Quarantine,
    progress: Callable[[int, int], None],
    check: Callable[[Plan], None] = lambda _: None,
) -> Dataset:
    """Packs the source into shards at `destination`, or completes them; returns the data set.

    `progress(done, total)` counts samples. `check` gets the plan before any image is decoded. Raises `UserError` for an
    unusable source or settings, more bad samples than `quarantine` allows, a destination with another content, and a
    place that cannot be written.
    """
    if data.source is None:
        return Dataset.open(destination)
    if storage.join(data.source.path) == storage.join(destination):
        raise UserError(f"data.shards={destination} is the source itself: give another folder for the packed data set")
    quarantine.begin(STAGE)
    contents = sources.find(data.source, pool=pool)
    plan = plan_shards(contents, data, seed=seed, destination=destination)
    check(plan)

    def report(bad: Sequence[tuple[str, str]]) -> None:
        for item, reason in bad:
            quarantine.add(STAGE, item, reason)
        quarantine.check(len(contents.records) + len(contents.bad))

    report(plan.bad)
    _take_place(destination, plan.made_from)
    index_of: dict[int, ShardIndex] = {}
    num_done, num_planned = 0, sum(len(job.samples) for job in plan.jobs)
    for number, index in pool.map(write_shard, plan.jobs):
        index_of[number] = index
        report(index.bad)
        num_done += len(plan.jobs[number].samples)
        progress(num_done, num_planned)
    indexes = [index_of[number] for number in range(len(plan.jobs))]
    manifest = _manifest(plan, indexes, train=data.train, destination=destination)
    shards = {shard.name for split in manifest.splits.values() for shard in split.shards}
    kept = shards | {index_name(name) for name in shards} | {f"{split}{LABELS_ENDING}" for split in manifest.splits}
    for name in storage.list_names(destination):  # removes files of other attempts
        left_over = name.endswith((".tar", ".index.msgpack", LABELS_ENDING)) or name.startswith(
            storage.TEMPORARY_PREFIX
        )
        if left_over and name not in kept:
            storage.remove(storage.join(destination, name))
    storage.write_bytes_atomic(storage.join(destination, MANIFEST_NAME), manifest.to_bytes())  # the commit
    storage.remove(storage.join(destination, PACKING_NAME))
    _log_what_was_packed(manifest, contents, window=data.window)
    return Dataset(url=destination, manifest=manifest)


def check_plan(plan: Plan, settings: Settings, *, left: Collection[str]) -> None:
    """Raises the errors of `check_splits`, `visible_labels` and `refuse_missing_experts` for the later stages."""
    if {*left} <= {STAGE}:
        return
    place = f"data.source={settings.data.source and settings.data.source.path}"
    check_splits(settings, plan.classes, plan.counts, place=place, trainings=left_trainings(settings, left))
    train = [sample.key for job in plan.jobs if job.split == settings.data.train for sample in job.samples]
    visible_labels(plan.labels(settings.data.train), settings.data.labels, keys=train, seed=settings.run.seed)
    given = Counter(given_name(name) for job in plan.jobs for sample in job.samples for name in sample.record.given)
    refuse_missing_experts(settings.prepare.chosen, given, place=place)


def plan_shards(contents: SourceContents, data: DataSettings, *, seed: int, destination: str) -> Plan:
    """Decides split, class, key, shard and place of every sample; raises the errors of `dpkd.data.splits.assign`."""
    assert data.source is not None
    records, stray = group_by_pattern(contents.records, data.group_pattern)
    files = data.splits.files if isinstance(data.splits, FileSplits) else {}
    listed = {split: read_lines(path, key=f"data.splits.files.{split}") for split, path in files.items()}
    assignment = assign(records, data.splits, seed=seed, train=data.train, listed=listed)
    kept = [(record, split) for record, split in zip(records, assignment.splits, strict=True) if split is not None]
    classes, has_several = contents.classes, any(record.labels is not None for record in records)
    if has_several and (single := [record.name for record in records if record.class_name is not None]):
        raise UserError(f"{single[0]} has a class, and other images have several labels: give all images the same kind")
    if classes is None:
        names = (name for record, _ in kept for name in record.labels or (record.class_name,))
        classes = sorted_classes(names)
    label_of = {name: label for label, name in enumerate(classes)} | {None: -1}
    samples: dict[str, list[Planned]] = defaultdict(list)
    for (record, split), key in zip(kept, keys_of([record.name for record, _ in kept]), strict=True):
        label: int | tuple[int, ...] = label_of[record.class_name]
        if has_several:
            label = tuple(-1 if record.labels is None else record.labels.get(name, 0) for name in classes)
        samples[split].append(Planned(key=key, label=label, record=record))
    if not contents.shuffled:  # shuffle, so that a few shards hold samples of all classes
        for planned in samples.values():
            planned.sort(key=lambda sample: draw(seed, sample.record.name))
    jobs = []
    for split, planned in sorted(samples.items()):
        if not re.fullmatch(r"\w[\w.-]*", split):
            raise UserError(f"the split {split!r} cannot name a file: use letters, digits, '_', '-' and '.'")
        for number, start in enumerate(range(0, len(planned), data.samples_per_shard)):
            part, name = tuple(planned[start : start + data.samples_per_shard]), f"{split}-{number:06d}.tar"
            jobs.append(ShardJob(url=destination, split=split, name=name, samples=part, window=data.window))
    return Plan(
        classes=classes,
        jobs=tuple(jobs),
        bad=(*contents.bad, *stray, *assignment.unknown),
        num_left_out=len(records) - len(kept),
        made_from=_made_from(contents.records, data, seed=seed),
    )


def _made_from(records: Sequence[Record], data: DataSettings, *, seed: int) -> dict[str, str]:
    """Everything that decides the bytes of the data set, by settings key; the location of the source does not."""
    assert data.source is not None
    made_from = {
        "data.source": describe_source(data.source, records),
        "data.splits": json.dumps(data.splits.model_dump(mode="json")),
        "data.group_pattern": str(data.group_pattern),
        "data.samples_per_shard": str(data.samples_per_shard),
        "data.train": data.train,
        "run.seed": str(seed),
        "format_version": str(FORMAT_VERSION),
    }
    if data.window is not None:
        made_from["data.window"] = f"{data.window.low:g} to {data.window.high:g}"
    return made_from


def _take_place(destination: str, made_from: dict[str, str]) -> None:
    """Marks the destination as packed by dpkd; raises `UserError` if it holds another data set or unknown tars."""
    names = storage.list_names(destination)
    if MANIFEST_NAME in names:
        before = Dataset.open(destination).manifest.made_from
        changed = [key for key in {**before, **made_from} if before.get(key) != made_from.get(key)]
        if changed:
            differences = "; ".join(f"{key} was {before.get(key)} and is {made_from.get(key)}" for key in changed)
            raise UserError(
                f"{destination} was packed from something else: {differences}. Choose another run.dir or data.shards, "
                "or remove that folder to pack it again"
            )
        return
    tars = [name for name in names if name.endswith(".tar")]
    if tars and PACKING_NAME not in names:
        raise UserError(
            f"{destination} holds tars without a {MANIFEST_NAME}, such as {tars[0]}: restore that file, give an empty "
            "folder as data.shards, or remove this one"
        )
    storage.write_bytes_atomic(storage.join(destination, PACKING_NAME), json.dumps(made_from, indent=1).encode())


def _manifest(plan: Plan, indexes: Sequence[ShardIndex], *, train: str, destination: str) -> Manifest:
    """The manifest; writes the labels of each split, which it lists."""
    by_split: dict[str, list[ShardIndex]] = defaultdict(list)
    for job, index in zip(plan.jobs, indexes, strict=True):
        by_split[job.split].append(index)
    splits = {}
    for split, parts in by_split.items():
        label = np.concatenate([index.label_N for index in parts if index.shard.num_samples] or [np.empty(0, int)])
        if not len(label):
            raise UserError(
                f"not one sample of the split {split!r} can be used, for example {parts[0].bad[0]}; see the quarantine"
            )
        splits[split] = SplitInfo(
            num_samples=len(label),
            num_unlabelled=int((label_known(label) < 0).sum()),
            class_counts=tuple(class_counts(label, len(plan.classes))),
            shards=tuple(index.shard for index in parts if index.shard.num_samples),
            labels=write_labels(destination, split, label, num_classes=len(plan.classes)),
            multi_label=plan.multi_label,
        )
    means, deviations = [], []
    counts_CV = np.array([index.pixel_counts for index in by_split.get(train, indexes)]).sum(axis=0)
    for counts in counts_CV.tolist():  # exact Python integers until the last division
        num, total, squares = (sum(count * value**power for value, count in enumerate(counts)) for power in range(3))
        means.append(total / num / 255)
        deviations.append(((squares * num - total * total) / num**2) ** 0.5 / 255)
    return Manifest(
        classes=plan.classes,
        splits=splits,
        image_mean=(means[0], means[1], means[2]),
        image_std=(deviations[0], deviations[1], deviations[2]),
        num_left_out=plan.num_left_out,
        made_from=plan.made_from,
    )


def _log_what_was_packed(manifest: Manifest, contents: SourceContents, *, window: Window | None) -> None:
    """Logs the layout of the source, the content of each split, and the samples and files left out."""
    if contents.layout:
        logger.info(f"pack: the folders are {contents.layout}")
    if window is not None:
        logger.info(f"pack: values of more than 8 bits from {window.low:g} to {window.high:g} became 0 to 255")
    num_classes, names = len(manifest.classes), list(manifest.classes[:10])
    named = f": {', '.join(names + ['…'] * (num_classes > 10))}" if names else ""
    kind = (
        "labels, of which an image may have several"
        if any(split.multi_label for split in manifest.splits.values())
        else "classes"
    )
    logger.info(f"pack: {num_classes:,} {kind}{named}")
    for name, split in manifest.splits.items():
        logger.info(
            f"pack: split {name}: {split.num_samples:,} samples, {split.num_samples - split.num_unlabelled:,} labelled "
            f"in {sum(map(bool, split.class_counts)):,} classes, {split.num_unlabelled:,} without a label"
        )
    if manifest.num_left_out:
        logger.info(f"pack: {manifest.num_left_out:,} samples are in no split of data.splits")
    if contents.ignored:
        logger.info(f"pack: ignored {describe_counts(contents.ignored)}")
