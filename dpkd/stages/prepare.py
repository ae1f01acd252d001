"""Prepare: image shards in, a prior set out (`dpkd.priors.shards` draws it). Each shard is one piece of work.

A shard that stands and was made from the same images with the same priors is kept. Any other is written anew, and the
maps of the shard in its place that still hold, by the fingerprint of the prior and the hash of the image, are carried
over: a changed prior is computed alone, and so is a changed image.

Priors that run on an accelerator are computed by a pool of their own, ahead of the others and at the same time: it
writes each shard with their maps alone beside the set, under a hidden name, and the pool that writes the set itself
carries these over as it does those that stand.
"""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice

import cv2
import numpy as np

from dpkd import storage
from dpkd.data.images import decode_image
from dpkd.data.shards import Dataset, Sample, ShardInfo, Split, SplitInfo, index_name
from dpkd.data.tars import TarWriter, list_members
from dpkd.errors import UserError
from dpkd.pool import Accelerator, Pool
from dpkd.priors import Prior
from dpkd.priors.codecs import Map
from dpkd.priors.expert import Expert
from dpkd.priors.extractor import BatchExtractor, Extractor, accelerated, fingerprint
from dpkd.priors.memory import keep_freed_memory
from dpkd.priors.picture import Picture
from dpkd.priors.record import MEMBER_EXTENSION, Record, StoredMap, flat, source_hash, store
from dpkd.priors.shards import MANIFEST_NAME, PriorIndex, PriorSet, fingerprints, set_url
from dpkd.priors.statistics import Tally
from dpkd.report.quarantine import Quarantine
from dpkd.stages.ahead import ahead
from dpkd.stages.prior_manifest import make_manifest, remove_unlisted, withdraw_other_manifest
from dpkd.stages.settings import PrepareSettings

STAGE = "prepare"
ACCELERATED_PREFIX = ".accelerated-"
"""Of shards that hold the maps of accelerated priors alone, until the set itself does."""
BLANK = Picture(np.zeros((1, 1, 3), np.uint8))


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

    Priors that ask for an accelerator run on it, or on `pool` without one. A sample whose maps cannot be computed goes
    to the quarantine and gets flat maps, which favour no place; past the limit of the quarantine the stage stops with
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
            for key, reason in index.bad:
                quarantine.add(STAGE, f"{index.shard.name}/{key}", reason)
            quarantine.check(total)
            done += index.shard.num_samples
            progress(done, total)
    manifest = make_manifest(dataset, priors, [indexes[number] for number in range(len(tasks))])
    storage.write_bytes_atomic(storage.join(url, MANIFEST_NAME), manifest.model_dump_json(indent=1).encode())
    remove_unlisted(url, manifest)
    return PriorSet.open(dataset.url, settings.name)


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
    index = _standing_index(task.place, task.images)
    if index is not None and index.fingerprints == fingerprints(task.priors):
        return index
    before = _sound_records(task.place)
    priors = accelerated(task.priors)
    index = _standing_index(task.accelerated_place, task.images) if priors else None
    if index is not None and index.fingerprints == fingerprints(priors):
        before = _with_accelerated(before, _records_by_key(task.accelerated_place))
    return _write_shard(task, task.place, before=before)


def _accelerate_shard(task: _Task) -> None:
    """Makes the shard of the accelerated priors, which are all that the task has, unless their maps stand somewhere."""
    _settle_in()
    wanted = fingerprints(task.priors)
    index = _standing_index(task.place, task.images)
    if index is not None and not index.bad and wanted.items() <= index.fingerprints.items():
        return
    index = _standing_index(task.accelerated_place, task.images)
    if index is None or index.fingerprints != wanted:
        _write_shard(task, task.accelerated_place, before=_sound_records(task.place))


def _settle_in() -> None:
    cv2.setNumThreads(1)  # the pool has a process for every core
    keep_freed_memory()


def _write_shard(task: _Task, place: str, *, before: dict[str, Record]) -> PriorIndex:
    """Makes the shard and its index at `place`; returns the index."""
    index, tar = _make_shard(task, before=before)
    storage.write_bytes_atomic(place, tar)
    storage.write_bytes_atomic(index_name(place), index.to_bytes())  # after the tar: it vouches for it
    return index


def _standing_index(place: str, images: ShardInfo) -> PriorIndex | None:
    """The index of the prior shard at `place` if it is whole and was made from these images."""
    try:
        index = PriorIndex.from_bytes(storage.read_bytes(index_name(place)))
        if index.images != images.sha256:
            return None
        return index if storage.sha256(place) == index.shard.sha256 else None
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def _sound_records(place: str) -> dict[str, Record]:
    """The records of the prior shard at `place` that hold maps: a sample that failed before is tried again."""
    return {key: record for key, record in _records_by_key(place).items() if record.bad is None}


def _with_accelerated(before: dict[str, Record], records: dict[str, Record]) -> dict[str, Record]:
    """The records before, with the maps of the accelerated ones, which say of a sample that failed that it did."""
    return before | {key: _joined(before.get(key), record) for key, record in records.items()}


def _joined(before: Record | None, record: Record) -> Record:
    """The record with those maps that the one before has of the same sample, too."""
    held = before.maps if before is not None and before.source == record.source else {}
    return replace(record, maps={**held, **record.maps})


def _records_by_key(place: str) -> dict[str, Record]:
    """The records of the prior shard at `place` that can be read, whatever they were made from."""
    records: dict[str, Record] = {}
    if not storage.exists(place):
        return records
    data = storage.read_bytes(place)
    for member in list_members(io.BytesIO(data), size_bytes=len(data)).members:
        try:
            record = Record.from_bytes(data[member.offset : member.offset + member.size])
        except ValueError:  # a damaged record is computed again
            continue
        records[record.key] = record
    return records


def _make_shard(task: _Task, *, before: dict[str, Record]) -> tuple[PriorIndex, bytes]:
    """The shard's index and bytes."""
    before = _with_batches(task, before=before)
    file = io.BytesIO()
    tar = TarWriter(file)
    members, bad = [], []
    tallies = {prior.name: Tally(prior.channels) for prior in task.priors if not prior.nearest}
    for record in _records(task, before=before):
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
    )
    return index, data


def _records(task: _Task, *, before: dict[str, Record]) -> Iterator[Record]:
    """The record of every sample of the shard, in order."""
    for sample in task.split.read_shard(0):
        yield _record(sample, task.priors, before=before.get(sample.key))


def _with_batches(task: _Task, *, before: dict[str, Record]) -> dict[str, Record]:
    """The records before, with the maps that they lack of priors that take images in batches.

    Which images go together depends on the shard alone, not on what is lacking or cannot be read, so that the same
    maps come out whenever they are made. An error of such a prior is not the fault of a sample, and stops the stage.
    """
    records = dict(before)
    for prior in task.priors:
        if isinstance(prior, BatchExtractor):
            samples = task.split.read_shard(0)
            while batch := list(islice(samples, prior.batch_size)):
                records.update(_batch_records(batch, prior, before=records, device=task.device))
    return records


def _batch_records(
    samples: list[Sample], prior: BatchExtractor, *, before: Mapping[str, Record], device: str
) -> dict[str, Record]:
    """The records, with the map of `prior`, of those samples that lack it and whose image can be read."""
    records = [_own_record(sample, before.get(sample.key)) for sample in samples]
    lacking = [record.bad is None and not _holds(record.maps.get(prior.name), prior) for record in records]
    if not any(lacking):
        return {}
    pictures = _pictures(samples, device=device)
    maps = prior.maps([picture or BLANK for picture in pictures], device=device)
    return {
        record.key: _with_map(record, prior, map_HWC)
        for record, lacks, picture, map_HWC in zip(records, lacking, pictures, maps, strict=True)
        if lacks and picture is not None
    }


def _pictures(samples: list[Sample], *, device: str) -> list[Picture | None]:
    """The images, none for those that cannot be read; by several threads where an accelerator would wait for one."""
    if device == "cpu":
        return [_picture_or_none(sample) for sample in samples]
    with ThreadPoolExecutor() as threads:
        return list(threads.map(_picture_or_none, samples))


def _picture_or_none(sample: Sample) -> Picture | None:
    try:
        return _picture(sample)
    except Exception:  # noqa: BLE001 (`_record` meets it again, and says why)
        return None


def _with_map(record: Record, prior: BatchExtractor, map_HWC: Map) -> Record:
    if not np.isfinite(map_HWC).all():
        return replace(record, bad=f"the map {prior.name!r} has values that are not finite")
    return replace(record, maps={**record.maps, prior.name: store(prior, map_HWC)})


def _record(sample: Sample, priors: tuple[Prior, ...], *, before: Record | None) -> Record:
    """The maps of a sample: carried over where they hold, else computed; flat, with the reason, where that fails."""
    own = _own_record(sample, before)
    if own.bad is not None:
        return _flat_record(own, priors, reason=own.bad)
    missing = [prior for prior in priors if not _holds(own.maps.get(prior.name), prior)]
    try:
        maps = {**own.maps, **_compute(sample, missing)}
    except Exception as error:  # noqa: BLE001 (the one place where a bad sample is survived: it is named and counted)
        return _flat_record(own, priors, reason=f"{type(error).__name__}: {error}")
    return replace(own, maps={prior.name: maps[prior.name] for prior in priors})


def _own_record(sample: Sample, before: Record | None) -> Record:
    """The record before, where it was made of this very sample, else one without a map."""
    source = source_hash(sample)
    return before if before is not None and before.source == source else Record(sample.key, source, {})


def _flat_record(record: Record, priors: tuple[Prior, ...], *, reason: str) -> Record:
    return replace(record, maps={prior.name: flat(prior) for prior in priors}, bad=reason)


def _holds(stored: StoredMap | None, prior: Extractor) -> bool:
    return stored is not None and stored.fingerprint == fingerprint(prior)


def _compute(sample: Sample, priors: list[Prior]) -> dict[str, StoredMap]:
    """The maps of `priors` for a sample, which is not decoded where there are none to compute."""
    if not priors:
        return {}
    picture = _picture(sample)
    return {prior.name: store(prior, prior.map(picture)) for prior in priors}


def _picture(sample: Sample) -> Picture:
    return Picture(decode_image(sample.image), given=sample.given)
