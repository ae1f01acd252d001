"""Prepare: image shards in, a prior set out (`dpkd.priors.shards` draws it). Each shard is one piece of work.

A shard that stands and was made from the same images with the same priors is kept. Any other is written anew, and the
maps of the shard in its place that still hold, by the fingerprint of the prior and the hash of the image, are carried
over: a changed prior is computed alone, and so is a changed image.

Priors that run on an accelerator are computed by a pool of their own, ahead of the others and at the same time: it
writes each shard with their maps alone beside the set, under a hidden name, and the pool that writes the set itself
carries these over as it does those that stand.

A sample that cannot be read (cut off, damaged, not an image) is quarantined, has no maps, and is listed in the set, so
that whatever follows leaves it out. A shard whose checksum differs from dataset.json loses just the samples whose own
checksums differ, which its index holds, and a line of the report says so: to drop the whole shard would throw away
samples that are proved sound, and to trust whatever decodes would let damage inside a JPEG pass for an image.
"""

import io
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import cv2

from dpkd.data.shard_index import ShardInfo, index_name
from dpkd.data.shards import Dataset, Split, SplitInfo
from dpkd.data.tars import TarWriter
from dpkd.errors import UserError
from dpkd.io import storage
from dpkd.io.errors import NO_FILE
from dpkd.launch.pool import Accelerator, Pool
from dpkd.log import logger
from dpkd.priors import Prior
from dpkd.priors.base import accelerated
from dpkd.priors.catalogue.expert import Expert
from dpkd.priors.memory import keep_freed_memory
from dpkd.priors.record import MEMBER_EXTENSION, Record
from dpkd.priors.shards import MANIFEST_NAME, PriorIndex, PriorSet, fingerprints, set_url
from dpkd.priors.statistics import Tally
from dpkd.report.quarantine import Quarantine
from dpkd.settings import PrepareSettings
from dpkd.stages.ahead import ahead
from dpkd.stages.prior_manifest import make_manifest, remove_unlisted, withdraw_other_manifest
from dpkd.stages.prior_records import make_records, read_records, sound_records, with_accelerated

STAGE = "prepare"
ACCELERATED_PREFIX = ".accelerated-"
"""Of shards that hold the maps of accelerated priors alone, until the set itself does."""


def prepare(
    dataset: Dataset,
    settings: PrepareSettings,
    *,
    pool: Pool,
    accelerator: Accelerator | None = None,
    quarantine: Quarantine,
    progress: Callable[[int, int], None],
) -> PriorSet:
    """Computes the prior maps of every sample that lacks them; returns the set.

    Priors that ask for an accelerator run on it, or on `pool` without one. A sample that cannot be read goes to the
    quarantine, and so does one whose maps cannot be computed, which gets flat maps that favour no place; past the limit
    of the quarantine the stage stops with `UserError`, and so it does where a shard or an index is missing.
        `UserError`. `progress` is told (samples done, samples in all).
    """
    priors = settings.sealed().priors
    _refuse_duplicates(priors)
    _refuse_what_nobody_gave(dataset, priors)
    url = set_url(dataset.url, settings.name)
    withdraw_other_manifest(url, dataset, priors)
    tasks = [
        _Task(split=_one_shard(dataset, name, shard), url=url, priors=priors)
        for name, info in dataset.manifest.splits.items()
        for shard in info.shards
    ]
    total = sum(task.split.num_samples for task in tasks)
    indexes: dict[int, PriorIndex] = {}
    quarantine.begin(STAGE)
    done = 0
    with _behind(accelerator, tasks) as ready:
        for number, index in pool.map(_prepare_shard, ready):
            indexes[number] = index
            _report(index, quarantine)
            quarantine.check(total)
            done += index.shard.num_samples
            progress(done, total)
    manifest = make_manifest(dataset, priors, [indexes[number] for number in range(len(tasks))])
    storage.write_bytes_atomic(storage.join(url, MANIFEST_NAME), manifest.to_bytes())
    remove_unlisted(url, manifest)
    return PriorSet.open(dataset.url, settings.name)


def _report(index: PriorIndex, quarantine: Quarantine) -> None:
    for key, reason in index.bad:
        quarantine.add(STAGE, f"{index.shard.name}/{key}", reason)
    if index.fault is not None:
        found = f"{index.fault}; {len(index.unreadable):,} of its {index.shard.num_samples:,} samples cannot be read"
        quarantine.note(STAGE, index.shard.name, f"{found}: copy or pack it again")
        logger.info(f"{STAGE}: {index.shard.name} is damaged: {found}")


@dataclass(frozen=True, repr=False)
class _Task:
    """One shard to prepare: a split of that shard alone."""

    split: Split
    url: str
    priors: tuple[Prior, ...]
    device: str = "cpu"
    """Where priors run that take images in batches, as torch names it."""

    @property
    def images(self) -> ShardInfo:
        """The image shard."""
        return self.split.info.shards[0]

    @property
    def place(self) -> str:
        """Where the prior shard stands."""
        return storage.join(self.url, self.images.name)

    @property
    def accelerated_place(self) -> str:
        """Where the maps of accelerated priors stand until the prior shard holds them."""
        return storage.join(self.url, ACCELERATED_PREFIX + self.images.name)

    def __repr__(self) -> str:
        return f"priors of {storage.join(self.split.url, self.images.name)}"


def _behind(accelerator: Accelerator | None, tasks: list[_Task]) -> AbstractContextManager[Sequence[_Task]]:
    """The tasks, each of which can be had once the accelerator, where there is one and work for it, is done with it."""
    priors = accelerated(tasks[0].priors) if tasks else ()
    if accelerator is None or not priors:
        return nullcontext(tasks)
    earlier = [replace(task, priors=priors, device=accelerator.device) for task in tasks]
    return ahead(tasks, pool=accelerator.pool, function=_accelerate_shard, earlier=earlier)


def _refuse_duplicates(priors: tuple[Prior, ...]) -> None:
    names = [prior.name for prior in priors]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"prepare.priors makes the map {name!r} {names.count(name)} times, and a set holds one map of a name: "
                "leave one, or prepare the other in a set of its own (prepare.name)"
            )


def _refuse_what_nobody_gave(dataset: Dataset, priors: tuple[Prior, ...]) -> None:
    experts = [prior for prior in priors if isinstance(prior, Expert)]
    given = dataset.given() if experts else {}
    for expert in experts:
        if expert.of not in given:
            names = ", ".join(f"{name} ({count:,} samples)" for name, count in given.items()) or "none"
            raise UserError(
                f"prepare.priors asks for the expert map {expert.of!r}, which no sample of {dataset.url} has; "
                f"given are: {names}; a map N of IMAGE.jpg is the file IMAGE.expert-N.png beside it, or IMAGE.mask.png"
            )


def _one_shard(dataset: Dataset, name: str, shard: ShardInfo) -> Split:
    """The split that consists of `shard` alone: little to send to a worker, however many shards there are."""
    info = SplitInfo(num_samples=shard.num_samples, num_unlabelled=0, class_counts=(), shards=(shard,))
    return Split(dataset.url, name, info)


def _prepare_shard(task: _Task) -> PriorIndex:
    """Makes one prior shard and its index, or finds that they stand; returns the index."""
    _settle_in()
    index = _standing_index(task.place, task)
    if index is not None and index.fingerprints == fingerprints(task.priors) and not _images_changed(index, task):
        return index
    before = sound_records(task.place)
    priors = accelerated(task.priors)
    index = _standing_index(task.accelerated_place, task) if priors else None
    if index is not None and index.fingerprints == fingerprints(priors):
        before = with_accelerated(before, read_records(task.accelerated_place))
    return _write_shard(task, task.place, before=before)


def _accelerate_shard(task: _Task) -> None:
    """Makes the shard of the accelerated priors, which are all that the task has, unless their maps stand somewhere."""
    _settle_in()
    wanted = fingerprints(task.priors)
    index = _standing_index(task.place, task)
    if index is not None and not index.bad and wanted.items() <= index.fingerprints.items():
        return
    index = _standing_index(task.accelerated_place, task)
    if index is None or index.fingerprints != wanted or _images_changed(index, task):
        _write_shard(task, task.accelerated_place, before=sound_records(task.place))


def _settle_in() -> None:
    cv2.setNumThreads(1)  # the pool has a process for every core
    keep_freed_memory()


def _write_shard(task: _Task, place: str, *, before: dict[str, Record]) -> PriorIndex:
    """Makes the shard and its index at `place`; returns the index."""
    index, tar = _make_shard(task, before=before)
    storage.write_bytes_atomic(place, tar)
    storage.write_bytes_atomic(index_name(place), index.to_bytes())  # after the tar: it vouches for it
    return index


def _standing_index(place: str, task: _Task) -> PriorIndex | None:
    """The index of the prior shard at `place` if it is whole and was made from these images."""
    try:
        index = PriorIndex.from_bytes(storage.read_bytes(index_name(place)))
        if index.images != task.images.sha256:
            return None
        return index if storage.sha256(place) == index.shard.sha256 else None
    except (*NO_FILE, ValueError):
        return None


def _images_changed(index: PriorIndex, task: _Task) -> bool:
    """Whether the image shard may differ from what the prior shard was made from, whatever dataset.json says.

    One that was damaged may have been mended since, and a local one damaged; a remote one is not fetched for the
    question alone.
    """
    local = storage.local_path(task.split.url) is not None
    return index.fault is not None or (local and task.split.fault(0) is not None)


def _make_shard(task: _Task, *, before: dict[str, Record]) -> tuple[PriorIndex, bytes]:
    """The shard's index and bytes."""
    file = io.BytesIO()
    tar = TarWriter(file)
    members, bad, unreadable = [], [], []
    tallies = {prior.name: Tally(prior.channels) for prior in task.priors if not prior.nearest}
    for row, record in enumerate(make_records(task.split, task.priors, before=before, device=task.device)):
        if not record.readable:
            unreadable.append(row)
        members.append(tar.add(f"{record.key}.{MEMBER_EXTENSION}", record.to_bytes()))
        if record.bad is not None:
            bad.append((record.key, record.bad))
            continue
        for name, tally in tallies.items():
            tally.add(record.maps[name].decode())
    tar.finish()
    data = file.getvalue()
    shard = ShardInfo(
        name=task.images.name, num_samples=len(members), size_bytes=len(data), sha256=storage.digest(data)
    )
    index = PriorIndex(
        shard=shard,
        images=task.images.sha256,
        fingerprints=fingerprints(task.priors),
        offsets=tuple(member.offset for member in members),
        sizes=tuple(member.size for member in members),
        moments={name: tally.moments for name, tally in tallies.items()},
        bad=tuple(bad),
        unreadable=tuple(unreadable),
        fault=task.split.fault(0),
    )
    return index, data
