"""Prepare: computes a prior set from image shards (`dpkd.priors.store` shows its format); each shard is a pool item.

A prior shard from the same images and the same priors is kept; any other is written again. If the old shard is whole,
its maps with the same fingerprint of the prior and hash of the image are copied: only changed priors and changed images
are computed.

With an accelerator, a first pass computes the maps of the priors that use one, and writes shards with these and the
copied maps. The second pass copies them and computes the other maps on the CPU.

A sample that cannot be read (cut off, damaged, not an image) is quarantined and has no maps. The set lists it, so that
later stages leave it out. If the checksum of a shard differs from dataset.json, only the samples with wrong checksums
in its index are lost, and the quarantine has a line for the shard: the other samples are proved whole, while a damaged
JPEG may still decode.
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
from dpkd.data.sample import Sample, Unreadable
from dpkd.data.shards import Dataset, ShardInfo, Split, SplitInfo, index_name
from dpkd.data.tars import Member, TarWriter
from dpkd.errors import UserError
from dpkd.io import storage
from dpkd.io.errors import NO_FILE
from dpkd.io.record import checked
from dpkd.launch.heartbeat import pulse
from dpkd.launch.pool import Accelerator, Pool
from dpkd.log import logger
from dpkd.priors import Prior
from dpkd.priors.base import BatchExtractor, ImageViews, PriorConfig, accelerated, fingerprint, keep_freed_memory
from dpkd.priors.catalogue.regions import Expert, Mask
from dpkd.priors.record import MEMBER_EXTENSION, Record, flat_map, source_hash, store_map
from dpkd.priors.store import MANIFEST_NAME, PriorIndex, PriorManifest, PriorSet, fingerprints, read_manifest, set_url
from dpkd.report.quarantine import Quarantine
from dpkd.settings import PrepareSettings

STAGE = "prepare"


@dataclass(frozen=True, repr=False)
class _Task:
    """One shard to prepare in one pass, as a split of only this shard, which is small to send to a worker."""

    split: Split
    url: str
    priors: tuple[Prior, ...]
    """Priors of the set."""
    computed: tuple[Prior, ...]
    """Priors of this pass."""
    before: tuple[Prior, ...] = ()
    """Priors of the previous pass."""
    device: str = "cpu"
    """Device of priors that process images in batches, by its name in torch."""

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

    Priors that use an accelerator run on it, or on `pool` without one. Samples that cannot be read are quarantined.
    Samples whose maps cannot be computed are quarantined too, and get flat maps, which favour no region. `progress`
    receives (samples done, all samples). Raises `UserError` above the limit of the quarantine, and if a shard or an
    index of the images is missing.
    """
    priors = settings.sealed().chosen
    experts = any(isinstance(prior, Expert | Mask) for prior in priors)
    refuse_missing_experts(priors, dataset.given() if experts else {}, place=dataset.url)
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
        first_pool, device = accelerator
        on_accelerator = [replace(task, computed=first, device=device) for task in tasks]
        passes = [(first_pool, on_accelerator), (pool, [replace(task, before=first) for task in tasks])]
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
    for name in storage.list_names(url):  # removes old shards of a larger set, which readers of all tars would use
        if name.endswith((".tar", ".index.msgpack")) and name not in listed:
            storage.remove(storage.join(url, name))
    return PriorSet.open(dataset.url, settings.name)


def refuse_missing_experts(priors: Sequence[Prior], given: Mapping[str, int], *, place: str) -> None:
    """Raises `UserError` for an expert map that no sample has; `given` counts the samples with each at `place`."""
    for expert in (prior.of for prior in priors if isinstance(prior, Expert | Mask)):
        if expert not in given:
            known = ", ".join(f"{name} ({count:,} samples)" for name, count in given.items()) or "none"
            raise UserError(
                f"prepare.priors asks for the expert map {expert!r}, which no sample of {place} has; given are: "
                f"{known}; the map N of IMAGE.jpg is a file IMAGE.expert-N.png or IMAGE.mask.png in its folder"
            )


def _manifest(dataset: Dataset, priors: tuple[Prior, ...], indexes: list[PriorIndex]) -> PriorManifest:
    """The manifest of the prior set; `indexes` are in the order of the data set's shards."""
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
    """Writes one prior shard and its index, unless they are complete; returns the index."""
    cv2.setNumThreads(1)  # the pool has one process per core
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
        with suppress(ValueError):  # another format
            record = Record.from_bytes(data[offset : offset + size])
            if record.bad is None or index.fingerprints == fingerprints(task.before):  # else compute it again
                records[record.key] = record
    return _write_shard(task, place, records)


def _is_complete(index: PriorIndex, task: _Task) -> bool:
    """Whether the prior shard of this index, from the same images, has the maps of this pass."""
    if index.fingerprints == fingerprints(task.priors):
        # with the same dataset.json a damaged image shard may have been repaired, and a local one damaged; a remote
        # shard is not fetched only for this check
        local = storage.local_path(task.split.url) is not None
        if index.fault is None and not (local and task.split.fault(0) is not None):
            return True
    computed = fingerprints(task.computed).items() <= index.fingerprints.items()
    return task.computed != task.priors and computed and not index.bad


def _write_shard(task: _Task, place: str, before: Mapping[str, Record]) -> PriorIndex:
    """Writes the shard and its index; keeps the maps of the records `before` that are still valid.

    The images of a batch depend only on the shard, not on missing maps or unreadable images, so that every pass
    computes the same maps. An error of a batch is not the fault of a sample, and stops the stage.
    """
    records: dict[str, Record] = {}
    for sample in task.split.read_shard(0):
        if isinstance(sample, Unreadable):
            records[sample.key] = Record(sample.key, b"", bad=sample.reason)
        else:
            source, old = source_hash(sample), before.get(sample.key)
            records[sample.key] = old if old is not None and old.source == source else Record(sample.key, source)
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
    storage.write_bytes_atomic(index_name(place), index.to_bytes())  # after the tar, whose checksum it holds
    return index


def _run_batch(samples: list[Sample | Unreadable], prior: Prior, records: dict[str, Record], *, device: str) -> None:
    """Adds the map of `prior` to the records of the samples that lack it and whose image can be read."""
    assert isinstance(prior, BatchExtractor), "other priors take one image at a time"
    batch_records = [records[sample.key] for sample in samples]
    lacking = [record.bad is None and not _holds(record, prior) for record in batch_records]
    if not any(lacking):
        return
    with ThreadPoolExecutor(1 if device == "cpu" else None) as threads:  # one thread is too slow for an accelerator
        images = list(threads.map(_views, samples))
    blank = ImageViews(np.zeros((1, 1, 3), np.uint8))
    maps = prior.maps([blank if isinstance(image, str) else image for image in images], device=device)
    for record, lacks, image, map_HWC in zip(batch_records, lacking, images, maps, strict=True):
        if not lacks or isinstance(image, str):  # `_finish` handles unreadable images
            continue
        try:
            if not np.isfinite(map_HWC).all():
                raise ValueError("has values that are not finite")
            records[record.key] = replace(record, maps={**record.maps, prior.name: store_map(prior, map_HWC)})
        except ValueError as error:
            records[record.key] = replace(record, bad=f"the map {prior.name!r} {error}")


def _finish(sample: Sample | Unreadable, record: Record, task: _Task) -> Record:
    """The record with all maps of this pass: no maps if the image cannot be read, flat maps if a prior fails."""
    missing = [prior for prior in task.computed if not _holds(record, prior)]
    if missing and record.bad is None:  # without missing maps the image has been decoded before
        image = _views(sample)
        if isinstance(image, str):
            return Record(sample.key, b"", bad=image)
        try:
            maps = {prior.name: store_map(prior, prior.map(image)) for prior in missing}
            record = replace(record, maps=record.maps | maps)
        except Exception as error:  # noqa: BLE001 (only here a failing prior is survived: named and counted)
            record = replace(record, bad=f"{type(error).__name__}: {error}")
    if record.bad is None:
        return replace(
            record, maps={prior.name: record.maps[prior.name] for prior in task.priors if _holds(record, prior)}
        )
    return replace(record, maps={prior.name: flat_map(prior) for prior in task.computed} if record.source else {})


def _views(sample: Sample | Unreadable) -> ImageViews | str:
    """The image of a sample, or the reason why it cannot be read."""
    if isinstance(sample, Unreadable):
        return sample.reason
    try:
        return ImageViews(decode_image(sample.image), given=sample.given)
    except BrokenImage as error:
        return str(error)


def _holds(record: Record, prior: PriorConfig) -> bool:
    """Whether the record has the map of the prior with its current settings."""
    return prior.name in record.maps and record.maps[prior.name].fingerprint.hex() == fingerprint(prior)
