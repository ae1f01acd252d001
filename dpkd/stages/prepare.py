"""Prepare: image shards in, a prior set out (`dpkd.priors.shards` draws it). Each shard is one piece of work.

A shard that stands and was made from the same images with the same priors is kept. Any other is written anew, and the
maps of the shard in its place that still hold, by the fingerprint of the prior and the hash of the image, are carried
over: a changed prior is computed alone, and so is a changed image.

A sample that cannot be read (cut off, damaged, not an image) is quarantined, has no maps, and is listed in the set, so
that whatever follows leaves it out. A shard whose checksum differs from dataset.json loses just the samples whose own
checksums differ, which its index holds, and a line of the report says so: to drop the whole shard would throw away
samples that are proved sound, and to trust whatever decodes would let damage inside a JPEG pass for an image.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate

import cv2

from dpkd import storage
from dpkd.data.images import BrokenImage, decode_image
from dpkd.data.shards import Dataset, Sample, ShardInfo, Split, SplitInfo, Unreadable, index_name
from dpkd.data.tars import TarWriter, list_members
from dpkd.errors import UserError
from dpkd.pool import Pool
from dpkd.priors import Prior
from dpkd.priors.expert import Expert
from dpkd.priors.extractor import fingerprint
from dpkd.priors.memory import keep_freed_memory
from dpkd.priors.picture import Picture
from dpkd.priors.record import MEMBER_EXTENSION, Record, StoredMap, flat, source_hash, store
from dpkd.priors.shards import (
    MANIFEST_NAME,
    ChannelStatistics,
    PriorIndex,
    PriorManifest,
    PriorSet,
    fingerprints,
    read_manifest,
    set_url,
)
from dpkd.priors.statistics import Moments, Tally
from dpkd.report.progress import say
from dpkd.report.quarantine import Quarantine
from dpkd.stages.settings import PrepareSettings

STAGE = "prepare"


def prepare(
    dataset: Dataset,
    settings: PrepareSettings,
    *,
    pool: Pool,
    quarantine: Quarantine,
    progress: Callable[[int, int], None],
) -> PriorSet:
    """Computes the prior maps of every sample that lacks them; returns the set.

    A sample that cannot be read goes to the quarantine, and so does one whose maps cannot be computed, which gets flat
    maps that favour no place. Past the limit of the quarantine the stage stops with `UserError`, and so it does where a
    shard or an index is missing. `progress` is told (samples done, samples in all).
    """
    _refuse_duplicates(settings.priors)
    _refuse_what_nobody_gave(dataset, settings.priors)
    url = set_url(dataset.url, settings.name)
    _withdraw_other_manifest(url, dataset, settings.priors)
    tasks = [
        _Task(split=_one_shard(dataset, name, shard), url=url, priors=settings.priors)
        for name, info in dataset.manifest.splits.items()
        for shard in info.shards
    ]
    total = sum(task.split.num_samples for task in tasks)
    indexes: dict[int, PriorIndex] = {}
    quarantine.begin(STAGE)
    done = 0
    for number, index in pool.map(_prepare_shard, tasks):
        indexes[number] = index
        _report(index, quarantine)
        quarantine.check(total)
        done += index.shard.num_samples
        progress(done, total)
    manifest = _manifest(dataset, settings.priors, [indexes[number] for number in range(len(tasks))])
    storage.write_bytes_atomic(storage.join(url, MANIFEST_NAME), manifest.model_dump_json(indent=1).encode())
    _remove_unlisted(url, manifest)
    return PriorSet.open(dataset.url, settings.name)


def _report(index: PriorIndex, quarantine: Quarantine) -> None:
    for key, reason in index.bad:
        quarantine.add(STAGE, f"{index.shard.name}/{key}", reason)
    if index.fault is not None:
        found = f"{index.fault}; {len(index.unreadable):,} of its {index.shard.num_samples:,} samples cannot be read"
        quarantine.note(STAGE, index.shard.name, f"{found}: copy or pack it again")
        say(f"{STAGE}: {index.shard.name} is damaged: {found}")


@dataclass(frozen=True, repr=False)
class _Task:
    """One shard to prepare: a split of that shard alone."""

    split: Split
    url: str
    priors: tuple[Prior, ...]

    def __repr__(self) -> str:
        return f"priors of {storage.join(self.split.url, self.split.info.shards[0].name)}"


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


def _withdraw_other_manifest(url: str, dataset: Dataset, priors: tuple[Prior, ...]) -> None:
    """Removes a manifest that is about to become untrue, before the first shard changes under it."""
    manifest = read_manifest(url)
    if manifest is None or (manifest.dataset, manifest.fingerprints) != (
        dataset.manifest.fingerprint,
        fingerprints(priors),
    ):
        _remove(storage.join(url, MANIFEST_NAME))


def _manifest(dataset: Dataset, priors: tuple[Prior, ...], indexes: list[PriorIndex]) -> PriorManifest:
    shards = iter(indexes)
    return PriorManifest(
        dataset=dataset.manifest.fingerprint,
        priors=priors,
        fingerprints=fingerprints(priors),
        statistics=_statistics(priors, indexes),
        splits={name: tuple(next(shards).shard for _ in info.shards) for name, info in dataset.manifest.splits.items()},
        unreadable=_unreadable(dataset, indexes),
        num_flat=sum(len(index.bad) - len(index.unreadable) for index in indexes),
    )


def _unreadable(dataset: Dataset, indexes: list[PriorIndex]) -> dict[str, tuple[int, ...]]:
    """The samples of each split that cannot be read, by their numbers in the split."""
    shards = iter(indexes)
    numbers: dict[str, tuple[int, ...]] = {}
    for name, info in dataset.manifest.splits.items():
        held = [next(shards) for _ in info.shards]
        ends = accumulate(index.shard.num_samples for index in held)
        numbers[name] = tuple(
            end - index.shard.num_samples + row
            for end, index in zip(ends, held, strict=True)
            for row in index.unreadable
        )
    return numbers


def _statistics(priors: tuple[Prior, ...], indexes: list[PriorIndex]) -> dict[str, ChannelStatistics]:
    totals = {
        prior.name: sum((index.moments[prior.name] for index in indexes), Moments.zero(prior.channels))
        for prior in priors
        if not prior.nearest
    }
    return {
        name: ChannelStatistics(mean=tuple(total.mean_C.tolist()), deviation=tuple(total.deviation_C.tolist()))
        for name, total in totals.items()
        if total.count
    }


def _remove_unlisted(url: str, manifest: PriorManifest) -> None:
    """Removes shards of an earlier, larger set, which a reader of all tars in the folder would take for its own."""
    listed = {shard.name for shards in manifest.splits.values() for shard in shards}
    listed |= {index_name(name) for name in listed}
    for name in storage.list_names(url):
        if name.endswith((".tar", ".index.msgpack")) and name not in listed:
            _remove(storage.join(url, name))


def _remove(place: str) -> None:
    if storage.exists(place):
        with storage.write_errors(place):
            storage.remove(place)


def _prepare_shard(task: _Task) -> PriorIndex:
    """Makes one prior shard and its index, or finds that they stand; returns the index."""
    cv2.setNumThreads(1)  # the pool has a process for every core
    keep_freed_memory()
    image_shard = task.split.info.shards[0]
    place = storage.join(task.url, image_shard.name)
    index = _standing_index(place, task)
    if index is not None:
        return index
    index, tar = _make_shard(task, before=_records_by_key(place))
    storage.write_bytes_atomic(place, tar)
    storage.write_bytes_atomic(index_name(place), index.to_bytes())  # after the tar: it vouches for it
    return index


def _standing_index(place: str, task: _Task) -> PriorIndex | None:
    """The index of the prior shard at `place` if it is whole and holds just these priors of these images.

    An image shard that was damaged may have been mended since, and a local one damaged; a remote one is not fetched for
    the question alone.
    """
    try:
        index = PriorIndex.from_bytes(storage.read_bytes(index_name(place)))
        if (index.images, index.fingerprints) != (task.split.info.shards[0].sha256, fingerprints(task.priors)):
            return None
        if storage.sha256(place) != index.shard.sha256:
            return None
    except UserError:  # the storage's, which says nothing of the shard
        raise
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    local = storage.local_path(task.split.url) is not None
    return None if index.fault is not None or (local and task.split.fault(0) is not None) else index


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
    image_shard = task.split.info.shards[0]
    file = io.BytesIO()
    tar = TarWriter(file)
    members, bad, unreadable = [], [], []
    tallies = {prior.name: Tally(prior.channels) for prior in task.priors if not prior.nearest}
    for row, record in enumerate(_records(task, before=before)):
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
        name=image_shard.name, num_samples=len(members), size_bytes=len(data), sha256=storage.digest(data)
    )
    index = PriorIndex(
        shard=shard,
        images=image_shard.sha256,
        fingerprints=fingerprints(task.priors),
        offsets=tuple(member.offset for member in members),
        sizes=tuple(member.size for member in members),
        moments={name: tally.moments for name, tally in tallies.items()},
        bad=tuple(bad),
        unreadable=tuple(unreadable),
        fault=task.split.fault(0),
    )
    return index, data


def _records(task: _Task, *, before: dict[str, Record]) -> Iterator[Record]:
    """The record of every sample of the shard, in order."""
    for sample in task.split.read_shard(0):
        yield _record(sample, task.priors, before=before.get(sample.key))


def _record(sample: Sample | Unreadable, priors: tuple[Prior, ...], *, before: Record | None) -> Record:
    """The maps of a sample: carried over where they hold, else computed; flat, with the reason, where that fails."""
    if isinstance(sample, Unreadable):
        return Record.unreadable(sample.key, reason=sample.reason)
    source = source_hash(sample)
    held = before.maps if before is not None and before.source == source and before.bad is None else {}
    missing = [prior for prior in priors if not _holds(held.get(prior.name), prior)]
    if not missing:  # then the image was decoded when its maps were made
        return Record(key=sample.key, source=source, maps={prior.name: held[prior.name] for prior in priors})
    try:
        picture = Picture(decode_image(sample.image), given=sample.given)
    except BrokenImage as error:
        return Record.unreadable(sample.key, reason=str(error))
    try:
        maps = {**held, **{prior.name: store(prior, prior.map(picture)) for prior in missing}}
    except Exception as error:  # noqa: BLE001 (the one place where a failing prior is survived: it is named and counted)
        reason = f"{type(error).__name__}: {error}"
        return Record(key=sample.key, source=source, maps={prior.name: flat(prior) for prior in priors}, bad=reason)
    return Record(key=sample.key, source=source, maps={prior.name: maps[prior.name] for prior in priors})


def _holds(stored: StoredMap | None, prior: Prior) -> bool:
    return stored is not None and stored.fingerprint == fingerprint(prior)
