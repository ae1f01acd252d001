"""Prepare: image shards in, a prior set out (`dpkd.priors.store` draws it). Each shard is one piece of work.

A shard that was made from the same images with the same priors is kept. Any other is written anew. Where the one in its
place is whole, the maps that still hold, by the fingerprint of the prior and the hash of the image, are carried over: a
changed prior is computed alone, and so is a changed image.

With an accelerator, a first pass computes the maps of the priors that ask for one and writes shards that hold these
beside what was carried over; the second pass carries them over in turn and computes the rest on the CPU.

A sample that cannot be read (cut off, damaged, not an image) is quarantined, has no maps, and is listed in the set, so
that whatever follows leaves it out. A shard whose checksum differs from dataset.json loses just the samples whose own
checksums differ, which its index holds, and the report has a line on it: to drop the whole shard would throw away
samples that are proved sound, and to trust whatever decodes would let damage inside a JPEG pass for an image.
"""

import io
from collections import Counter
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
from dpkd.data.tars import Member, TarWriter
from dpkd.errors import UserError
from dpkd.io import storage
from dpkd.io.errors import NO_FILE
from dpkd.io.record import checked
from dpkd.launch.heartbeat import pulse
from dpkd.launch.pool import Accelerator, Pool
from dpkd.log import logger
from dpkd.priors import Prior
from dpkd.priors.base import BatchExtractor, Extractor, ImageViews, accelerated, fingerprint, keep_freed_memory
from dpkd.priors.catalogue.regions import Expert
from dpkd.priors.record import MEMBER_EXTENSION, Record, flat_map, source_hash, store_map
from dpkd.priors.store import MANIFEST_NAME, PriorIndex, PriorManifest, PriorSet, fingerprints, read_manifest, set_url
from dpkd.report.quarantine import Quarantine
from dpkd.settings import PrepareSettings

STAGE = "prepare"


@dataclass(frozen=True, repr=False)
class _Task:
    """One shard to prepare in one pass: a split of that shard alone, which is little to send to a worker."""

    split: Split
    url: str
    priors: tuple[Prior, ...]
    """Those of the set."""
    computed: tuple[Prior, ...]
    """Those of this pass."""
    before: tuple[Prior, ...] = ()
    """Those of the pass before."""
    device: str = "cpu"
    """Where priors run that take images in batches, as torch names it."""

    @property
    def images(self) -> ShardInfo:
        """The image shard."""
        return self.split.info.shards[0]

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
    if accelerator is not None and (first := accelerated(priors)):
        on_accelerator = [replace(task, computed=first, device=accelerator.device) for task in tasks]
        passes = [(accelerator.pool, on_accelerator), (pool, [replace(task, before=first) for task in tasks])]
    total, num_done = sum(task.split.num_samples for task in tasks), 0
    quarantine.begin(STAGE)
    indexes: dict[int, PriorIndex] = {}
    for pool_of_pass, tasks_of_pass in passes:
        for number, index in pool_of_pass.map(_prepare_shard, tasks_of_pass):
            indexes[number], name = index, index.shard.name
            for key, reason in index.bad:
                quarantine.add(STAGE, f"{name}/{key}", reason)
            if index.fault is not None:
                lost = f"{len(index.unreadable):,} of its {index.shard.num_samples:,} samples cannot be read"
                quarantine.add(STAGE, name, f"{index.fault}; {lost}: copy or pack it again", counted=False)
                logger.info(f"{STAGE}: {name} is damaged: {index.fault}; {lost}")
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
    name, count = Counter(prior.name for prior in priors).most_common(1)[0] if priors else ("", 0)
    if count > 1:
        raise UserError(
            f"prepare.priors makes the map {name!r} {count} times: leave one, or prepare the other in a set of its own "
            "(prepare.name)"
        )
    experts = [prior.of for prior in priors if isinstance(prior, Expert)]
    given = dataset.given() if experts else {}
    for expert in experts:
        if expert not in given:
            known = ", ".join(f"{name} ({count:,} samples)" for name, count in given.items()) or "none"
            raise UserError(
                f"prepare.priors asks for the expert map {expert!r}, which no sample of {dataset.url} has; given are: "
                f"{known}; a map N of IMAGE.jpg is the file IMAGE.expert-N.png beside it, or IMAGE.mask.png"
            )


def _manifest(dataset: Dataset, priors: tuple[Prior, ...], indexes: list[PriorIndex]) -> PriorManifest:
    """The manifest of the set whose shards have these indexes, in the order of the data set's."""
    splits, unreadable, remaining = {}, {}, iter(indexes)
    for name, info in dataset.manifest.splits.items():
        of_split = list(islice(remaining, len(info.shards)))
        splits[name] = tuple(index.shard for index in of_split)
        starts = accumulate((index.shard.num_samples for index in of_split), initial=0)
        rows = [(start, index.unreadable) for start, index in zip(starts, of_split, strict=False)]
        unreadable[name] = tuple(start + row for start, lost in rows for row in lost)
    return PriorManifest(
        dataset=dataset.manifest.fingerprint,
        priors=priors,
        fingerprints=fingerprints(priors),
        splits=splits,
        unreadable=unreadable,
        num_flat=sum(len(index.bad) - len(index.unreadable) for index in indexes),
    )


def _prepare_shard(task: _Task) -> PriorIndex:
    """Makes one prior shard and its index where they lack something; returns the index."""
    cv2.setNumThreads(1)  # the pool has a process for every core
    keep_freed_memory()
    place = storage.join(task.url, task.images.name)
    index, data = None, b""
    with suppress(*NO_FILE, ValueError):
        data = storage.read_bytes(place)
        index = PriorIndex.from_bytes(storage.read_bytes(index_name(place)))
    if index is None or storage.digest(data) != index.shard.sha256:
        return _write_shard(task, place, {})
    if index.images == task.images.sha256 and _is_complete(index, task):
        return index
    records: dict[str, Record] = {}
    for offset, size in zip(index.offsets, index.sizes, strict=True):
        with suppress(ValueError):  # of another format
            record = Record.from_bytes(data[offset : offset + size])
            if record.bad is None or index.fingerprints == fingerprints(task.before):  # else it is tried again
                records[record.key] = record
    return _write_shard(task, place, records)


def _is_complete(index: PriorIndex, task: _Task) -> bool:
    """Whether the shard of this index, made from these images, has the maps of this pass."""
    if index.fingerprints == fingerprints(task.priors):
        # dataset.json is the same, but a damaged image shard may be mended since, and a local one damaged; a remote one
        # is not fetched for the question alone
        local = storage.local_path(task.split.url) is not None
        if index.fault is None and not (local and task.split.fault(0) is not None):
            return True
    computed = fingerprints(task.computed).items() <= index.fingerprints.items()
    return task.computed != task.priors and computed and not index.bad


def _write_shard(task: _Task, place: str, before: Mapping[str, Record]) -> PriorIndex:
    """Writes the shard and its index; maps of the records from before are kept where they still hold.

    Which images share a batch depends on the shard alone, not on what is lacking or cannot be read, so that the same
    maps come out whenever they are made. An error of a batch is not the fault of a sample, and stops the stage.
    """
    records: dict[str, Record] = {}
    for sample in task.split.read_shard(0):
        if isinstance(sample, Unreadable):
            records[sample.key] = Record(sample.key, b"", bad=sample.reason)
        else:
            source, held = source_hash(sample), before.get(sample.key)
            records[sample.key] = held if held is not None and held.source == source else Record(sample.key, source)
    for prior in task.computed:
        if isinstance(prior, BatchExtractor):
            samples = task.split.read_shard(0)
            while batch := list(islice(samples, prior.batch_size)):
                pulse()
                _run_batch(batch, prior, records, device=task.device)
    members: list[Member] = []
    file = io.BytesIO()
    tar = TarWriter(file)
    for sample in task.split.read_shard(0):
        pulse()
        record = records[sample.key] = _finish(sample, records[sample.key], task)
        members.append(tar.add(f"{record.key}.{MEMBER_EXTENSION}", record.to_bytes()))
    tar.finish()
    shard = ShardInfo(name=task.images.name, num_samples=len(members), size_bytes=tar.size_bytes, sha256=tar.sha256)
    index = PriorIndex(
        shard=shard,
        images=task.images.sha256,
        fingerprints=fingerprints(task.computed),
        offsets=tuple(member.offset for member in members),
        sizes=tuple(member.size for member in members),
        bad=tuple((record.key, record.bad) for record in records.values() if record.bad is not None),
        unreadable=tuple(row for row, record in enumerate(records.values()) if not record.source),
        fault=task.split.fault(0),
    )
    storage.write_bytes_atomic(place, file.getvalue())
    storage.write_bytes_atomic(index_name(place), index.to_bytes())  # after the tar: it vouches for it
    return index


def _run_batch(
    samples: list[Sample | Unreadable], prior: BatchExtractor, records: dict[str, Record], *, device: str
) -> None:
    """Adds the map of `prior` to the records of those samples that lack it and whose image can be read."""
    own = [records[sample.key] for sample in samples]
    lacking = [record.bad is None and not _holds(record, prior) for record in own]
    if not any(lacking):
        return
    with ThreadPoolExecutor(1 if device == "cpu" else None) as threads:  # an accelerator would wait for one
        images = list(threads.map(_views, samples))
    blank = ImageViews(np.zeros((1, 1, 3), np.uint8))
    maps = prior.maps([blank if isinstance(image, str) else image for image in images], device=device)
    for record, lacks, image, map_HWC in zip(own, lacking, images, maps, strict=True):
        if not lacks or isinstance(image, str):  # `_finish` meets what cannot be read again
            continue
        try:
            if not np.isfinite(map_HWC).all():
                raise ValueError("has values that are not finite")
            records[record.key] = replace(record, maps={**record.maps, prior.name: store_map(prior, map_HWC)})
        except ValueError as error:
            records[record.key] = replace(record, bad=f"the map {prior.name!r} {error}")


def _finish(sample: Sample | Unreadable, record: Record, task: _Task) -> Record:
    """The record with all maps of this pass; without any where the image cannot be read, flat where one fails."""
    missing = [prior for prior in task.computed if not _holds(record, prior)]
    if missing and record.bad is None:  # else the image was decoded when its maps were made
        image = _views(sample)
        if isinstance(image, str):
            return Record(sample.key, b"", bad=image)
        try:
            maps = {prior.name: store_map(prior, prior.map(image)) for prior in missing}
            record = replace(record, maps=record.maps | maps)
        except Exception as error:  # noqa: BLE001 (the one place where a failing prior is survived: named and counted)
            record = replace(record, bad=f"{type(error).__name__}: {error}")
    if record.bad is None:
        return replace(
            record, maps={prior.name: record.maps[prior.name] for prior in task.priors if _holds(record, prior)}
        )
    return replace(record, maps={prior.name: flat_map(prior) for prior in task.computed} if record.source else {})


def _views(sample: Sample | Unreadable) -> ImageViews | str:
    """The image of a sample, or why it cannot be read."""
    if isinstance(sample, Unreadable):
        return sample.reason
    try:
        return ImageViews(decode_image(sample.image), given=sample.given)
    except BrokenImage as error:
        return str(error)


def _holds(record: Record, prior: Extractor) -> bool:
    """Whether the record has the map of the prior as its settings are now."""
    return prior.name in record.maps and record.maps[prior.name].fingerprint.hex() == fingerprint(prior)
