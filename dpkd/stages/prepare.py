"""Prepare: image shards in, a prior set out (`dpkd.priors.store` draws it). Each shard is one piece of work.

A shard that was made from the same images with the same priors is kept. Any other is written anew, and the maps of the
shard in its place that still hold, by the fingerprint of the prior and the hash of the image, are carried over: a
changed prior is computed alone, and so is a changed image.

With an accelerator, a first pass computes the maps of the priors that ask for one and writes shards that hold these
beside what was carried over; the second pass carries them over in turn and computes the rest on the CPU.

A sample that cannot be read (cut off, damaged, not an image) is quarantined, has no maps, and is listed in the set, so
that whatever follows leaves it out. A shard whose checksum differs from dataset.json loses just the samples whose own
checksums differ, which its index holds, and the report has a line on it: to drop the whole shard would throw away
samples that are proved sound, and to trust whatever decodes would let damage inside a JPEG pass for an image.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate, islice

import cv2
import numpy as np

from dpkd.data.image_headers import BrokenImage
from dpkd.data.images import decode_image
from dpkd.data.shards import Dataset, Sample, ShardInfo, Split, SplitInfo, Unreadable, index_name
from dpkd.data.tars import TarWriter, list_members
from dpkd.errors import UserError
from dpkd.io import storage
from dpkd.io.errors import NO_FILE
from dpkd.io.record import checked
from dpkd.launch.heartbeat import pulse
from dpkd.launch.pool import Accelerator, Pool
from dpkd.log import logger
from dpkd.priors import Prior
from dpkd.priors.base import BatchExtractor, Extractor, ImageViews, accelerated, fingerprint
from dpkd.priors.catalogue.expert import Expert
from dpkd.priors.memory import keep_freed_memory
from dpkd.priors.record import MEMBER_EXTENSION, Record, StoredMap, flat_map, source_hash, store_map
from dpkd.priors.store import (
    MANIFEST_NAME,
    PriorIndex,
    PriorManifest,
    PriorSet,
    RunningMoments,
    fingerprints,
    read_manifest,
    set_url,
)
from dpkd.report.quarantine import Quarantine
from dpkd.settings import PrepareSettings

STAGE = "prepare"


@dataclass(frozen=True, repr=False)
class _Task:
    """One shard to prepare: a split of that shard alone, which is little to send to a worker."""

    split: Split
    url: str
    priors: tuple[Prior, ...]
    """Those of the set."""
    computed: tuple[Prior, ...]
    """Those of this pass."""
    device: str = "cpu"
    """Where priors run that take images in batches, as torch names it."""
    after_first_pass: bool = False
    """Whether an accelerator has computed its priors before."""

    @property
    def images(self) -> ShardInfo:
        """The image shard."""
        return self.split.info.shards[0]

    @property
    def place(self) -> str:
        """The location of the prior shard."""
        return storage.join(self.url, self.images.name)

    def __repr__(self) -> str:
        return f"priors of {storage.join(self.split.url, self.images.name)}"


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
    quarantine, and so does one whose maps cannot be computed, which gets flat maps that favour no place. `progress`
    receives (samples done, samples in all). Raises `UserError` past the limit of the quarantine, and where a shard or
    an index of the images is missing.
    """
    priors = settings.sealed().chosen
    _check(dataset, priors)
    url = set_url(dataset.url, settings.name)
    before = read_manifest(url)
    if before is None or (before.dataset, before.fingerprints) != (dataset.manifest.fingerprint, fingerprints(priors)):
        storage.remove(storage.join(url, MANIFEST_NAME))  # before the first shard changes under it
    tasks = []
    for name, info in dataset.manifest.splits.items():
        for shard in info.shards:
            alone = SplitInfo(num_samples=shard.num_samples, num_unlabelled=0, class_counts=(), shards=(shard,))
            tasks.append(_Task(Split(dataset.url, name, alone), url, priors, computed=priors))
    passes = [(pool, tasks)]
    first = accelerated(priors)
    if accelerator is not None and first:
        on_accelerator = [replace(task, computed=first, device=accelerator.device) for task in tasks]
        passes = [(accelerator.pool, on_accelerator), (pool, [replace(task, after_first_pass=True) for task in tasks])]
    total = sum(task.split.num_samples for task in tasks)
    quarantine.begin(STAGE)
    indexes: dict[int, PriorIndex] = {}
    num_done = 0
    for pool_of_pass, tasks_of_pass in passes:
        for number, index in pool_of_pass.map(_prepare_shard, tasks_of_pass):
            indexes[number] = index
            _report(index, quarantine)
            quarantine.check(total)
            num_done += index.shard.num_samples
            progress(num_done // len(passes), total)
    manifest = _manifest(dataset, priors, [indexes[number] for number in range(len(tasks))])
    storage.write_bytes_atomic(storage.join(url, MANIFEST_NAME), checked(manifest.model_dump(mode="json")))
    listed = {name for task in tasks for name in (task.images.name, index_name(task.images.name))}
    for name in storage.list_names(url):  # a reader of all tars would take those of an earlier, larger set for its own
        if name.endswith((".tar", ".index.msgpack")) and name not in listed:
            storage.remove(storage.join(url, name))
    return PriorSet.open(dataset.url, settings.name)


def _check(dataset: Dataset, priors: Sequence[Prior]) -> None:
    """Raises `UserError` for two maps of one name, and for an expert map that no sample has."""
    names = [prior.name for prior in priors]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"prepare.priors makes the map {name!r} {names.count(name)} times, and a set holds one map of a name: "
                "leave one, or prepare the other in a set of its own (prepare.name)"
            )
    experts = [prior for prior in priors if isinstance(prior, Expert)]
    given = dataset.given() if experts else {}
    for expert in experts:
        if expert.of not in given:
            given_names = ", ".join(f"{name} ({count:,} samples)" for name, count in given.items()) or "none"
            raise UserError(
                f"prepare.priors asks for the expert map {expert.of!r}, which no sample of {dataset.url} has; given "
                f"are: {given_names}; a map N of IMAGE.jpg is the file IMAGE.expert-N.png beside it, or IMAGE.mask.png"
            )


def _report(index: PriorIndex, quarantine: Quarantine) -> None:
    for key, reason in index.bad:
        quarantine.add(STAGE, f"{index.shard.name}/{key}", reason)
    if index.fault is not None:
        loss = f"{index.fault}; {len(index.unreadable):,} of its {index.shard.num_samples:,} samples cannot be read"
        quarantine.add(STAGE, index.shard.name, f"{loss}: copy or pack it again", counted=False)
        logger.info(f"{STAGE}: {index.shard.name} is damaged: {loss}")


def _manifest(dataset: Dataset, priors: tuple[Prior, ...], indexes: list[PriorIndex]) -> PriorManifest:
    """The manifest of the set whose shards have these indexes, in the order of the data set's."""
    splits, unreadable, remaining = {}, {}, iter(indexes)
    for name, info in dataset.manifest.splits.items():
        of_split = list(islice(remaining, len(info.shards)))
        splits[name] = tuple(index.shard for index in of_split)
        starts = accumulate((index.shard.num_samples for index in of_split), initial=0)
        unreadable[name] = tuple(
            start + row for start, index in zip(starts, of_split, strict=False) for row in index.unreadable
        )
    totals = {
        prior.name: sum((index.moments[prior.name] for index in indexes), RunningMoments.zero(prior.channels))
        for prior in priors
        if not prior.nearest
    }
    return PriorManifest(
        dataset=dataset.manifest.fingerprint,
        priors=priors,
        fingerprints=fingerprints(priors),
        statistics={name: moments.statistics() for name, moments in totals.items() if moments.count},
        splits=splits,
        unreadable=unreadable,
        num_flat=sum(len(index.bad) - len(index.unreadable) for index in indexes),
    )


def _prepare_shard(task: _Task) -> PriorIndex:
    """Makes one prior shard and its index where they lack something; returns the index."""
    cv2.setNumThreads(1)  # the pool has a process for every core
    keep_freed_memory()
    index, first = _index(task), fingerprints(accelerated(task.priors))
    if index is not None:
        # dataset.json is the same, but a damaged image shard may be mended since, and a local one damaged; a remote one
        # is not fetched for the question alone
        local = storage.local_path(task.split.url) is not None
        complete = index.fingerprints == fingerprints(task.priors)
        if complete and index.fault is None and not (local and task.split.fault(0) is not None):
            return index
        lacks_none = not index.bad and fingerprints(task.computed).items() <= index.fingerprints.items()
        if task.computed != task.priors and lacks_none:
            return index
    before = _read_records(task.place)
    if not (task.after_first_pass and index is not None and index.fingerprints == first):
        before = {key: record for key, record in before.items() if record.bad is None}  # what failed is tried again
    index, tar = _make_shard(task, before=before)
    storage.write_bytes_atomic(task.place, tar)
    storage.write_bytes_atomic(index_name(task.place), index.to_bytes())  # after the tar: it vouches for it
    return index


def _index(task: _Task) -> PriorIndex | None:
    """The index of the prior shard if it is whole and was made from these images."""
    try:
        index = PriorIndex.from_bytes(storage.read_bytes(index_name(task.place)))
        whole = index.images == task.images.sha256 and storage.sha256(task.place) == index.shard.sha256
    except (*NO_FILE, ValueError):
        return None
    return index if whole else None


def _read_records(place: str) -> dict[str, Record]:
    """The records of the prior shard at `place` that can be read, by key, whatever they were made from."""
    records: dict[str, Record] = {}
    try:
        data = storage.read_bytes(place)
    except NO_FILE:
        return records
    for member in list_members(io.BytesIO(data), size_bytes=len(data)).members:
        with suppress(ValueError):  # a damaged record is computed again
            record = Record.from_bytes(data[member.offset : member.offset + member.size])
            records[record.key] = record
    return records


def _make_shard(task: _Task, *, before: Mapping[str, Record]) -> tuple[PriorIndex, bytes]:
    """The shard's index and bytes; `before` holds the records whose maps are carried over where they still hold."""
    records = _make_records(task, before=before)
    moments = {prior.name: RunningMoments.zero(prior.channels) for prior in task.computed if not prior.nearest}
    for record in (record for record in records if record.bad is None):
        for name in moments:
            moments[name] += RunningMoments.of(record.maps[name].decode())
    file = io.BytesIO()
    tar = TarWriter(file)
    members = [tar.add(f"{record.key}.{MEMBER_EXTENSION}", record.to_bytes()) for record in records]
    tar.finish()
    data = file.getvalue()
    digest = storage.digest(data)
    index = PriorIndex(
        shard=ShardInfo(name=task.images.name, num_samples=len(records), size_bytes=len(data), sha256=digest),
        images=task.images.sha256,
        fingerprints=fingerprints(task.computed),
        offsets=tuple(member.offset for member in members),
        sizes=tuple(member.size for member in members),
        moments=moments,
        bad=tuple((record.key, record.bad) for record in records if record.bad is not None),
        unreadable=tuple(row for row, record in enumerate(records) if not record.source),
        fault=task.split.fault(0),
    )
    return index, data


def _make_records(task: _Task, *, before: Mapping[str, Record]) -> list[Record]:
    """The record of every sample of the shard, in order: without maps where it cannot be read, flat where a map fails.

    Which images share a batch depends on the shard alone, not on what is lacking or cannot be read, so that the same
    maps come out whenever they are made. An error of a batch is not the fault of a sample, and stops the stage.
    """
    records = dict(before)
    for prior in task.computed:
        if isinstance(prior, BatchExtractor):
            samples = task.split.read_shard(0)
            while batch := list(islice(samples, prior.batch_size)):
                pulse()
                records |= _run_batch(batch, prior, before=records, device=task.device)
    made = []
    for sample in task.split.read_shard(0):
        pulse()
        made.append(_make_record(sample, task, before=records.get(sample.key)))
    return made


def _run_batch(
    samples: list[Sample | Unreadable], prior: BatchExtractor, *, before: Mapping[str, Record], device: str
) -> dict[str, Record]:
    """The records, with the map of `prior`, of those samples that lack it and whose image can be read."""
    own = {sample.key: _own_record(sample, before.get(sample.key)) for sample in samples if isinstance(sample, Sample)}
    lacking = {key for key, record in own.items() if record.bad is None and not _holds(record.maps, prior)}
    if not lacking:
        return {}
    with ThreadPoolExecutor(1 if device == "cpu" else None) as threads:  # an accelerator would wait for one
        images = list(threads.map(_views, samples))
    blank = ImageViews(np.zeros((1, 1, 3), np.uint8))
    maps = prior.maps([blank if isinstance(image, str) else image for image in images], device=device)
    made = {}
    for sample, image, map_HWC in zip(samples, images, maps, strict=True):
        if isinstance(image, str) or sample.key not in lacking:  # `_make_record` meets what cannot be read again
            continue
        record = own[sample.key]
        try:
            if not np.isfinite(map_HWC).all():
                raise ValueError("has values that are not finite")
            made[sample.key] = replace(record, maps={**record.maps, prior.name: store_map(prior, map_HWC)})
        except ValueError as error:
            made[sample.key] = replace(record, bad=f"the map {prior.name!r} {error}")
    return made


def _make_record(sample: Sample | Unreadable, task: _Task, *, before: Record | None) -> Record:
    if isinstance(sample, Unreadable):
        return Record(sample.key, b"", bad=sample.reason)
    own = _own_record(sample, before)
    maps, bad = own.maps, own.bad
    missing = [prior for prior in task.computed if not _holds(maps, prior)]
    if missing and bad is None:  # else the image was decoded when its maps were made
        image = _views(sample)
        if isinstance(image, str):
            return Record(sample.key, b"", bad=image)
        try:
            maps = maps | {prior.name: store_map(prior, prior.map(image)) for prior in missing}
        except Exception as error:  # noqa: BLE001 (the one place where a failing prior is survived: named and counted)
            bad = f"{type(error).__name__}: {error}"
    if bad is not None:
        return replace(own, maps={prior.name: flat_map(prior) for prior in task.computed}, bad=bad)
    return replace(own, maps={prior.name: maps[prior.name] for prior in task.priors if _holds(maps, prior)})


def _views(sample: Sample | Unreadable) -> ImageViews | str:
    """The image of a sample, or why it cannot be read."""
    if isinstance(sample, Unreadable):
        return sample.reason
    try:
        return ImageViews(decode_image(sample.image), given=sample.given)
    except BrokenImage as error:
        return str(error)


def _own_record(sample: Sample, before: Record | None) -> Record:
    """The record before, where it was made of this very sample, else one without a map."""
    source = source_hash(sample)
    return before if before is not None and before.source == source else Record(sample.key, source)


def _holds(maps: Mapping[str, StoredMap], prior: Extractor) -> bool:
    """Whether the maps have that of the prior as its settings are now."""
    return prior.name in maps and maps[prior.name].fingerprint.hex() == fingerprint(prior)
