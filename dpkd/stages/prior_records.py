"""The records of a shard: maps carried over where they hold, else computed; flat, with the reason, where that fails."""

import io
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice

import numpy as np

from dpkd.data.images import BrokenImage, decode_image
from dpkd.data.shards import Sample, Split, Unreadable
from dpkd.data.tars import list_members
from dpkd.io import storage
from dpkd.io.errors import NO_FILE
from dpkd.launch.heartbeat import pulse
from dpkd.priors import Prior
from dpkd.priors.base import BatchExtractor, Extractor, fingerprint
from dpkd.priors.codecs import Map
from dpkd.priors.image_views import ImageViews
from dpkd.priors.record import Record, StoredMap, flat, source_hash, store

BLANK = ImageViews(np.zeros((1, 1, 3), np.uint8))


def make_records(
    split: Split, priors: Sequence[Prior], *, before: Mapping[str, Record], device: str
) -> Iterator[Record]:
    """The record of every sample of a split of one shard, in order; `before` are those that may hold, by key.

    Priors that take images in batches run on `device`, as torch names it. A sample that cannot be read has a record
    without maps; one of whose maps fails has flat ones.
    """
    records = _with_batches(split, priors, before=before, device=device)
    for sample in split.read_shard(0):
        pulse()
        yield _record(sample, priors, before=records.get(sample.key))


def read_records(place: str) -> dict[str, Record]:
    """The records of the prior shard at `place` that can be read, whatever they were made from."""
    records: dict[str, Record] = {}
    try:
        data = storage.read_bytes(place)
    except NO_FILE:
        return records
    for member in list_members(io.BytesIO(data), size_bytes=len(data)).members:
        try:
            record = Record.from_bytes(data[member.offset : member.offset + member.size])
        except ValueError:  # a damaged record is computed again
            continue
        records[record.key] = record
    return records


def sound_records(place: str) -> dict[str, Record]:
    """The records of the prior shard at `place` that hold maps: a sample that failed before is tried again."""
    return {key: record for key, record in read_records(place).items() if record.bad is None}


def with_accelerated(before: dict[str, Record], records: dict[str, Record]) -> dict[str, Record]:
    """The records before, with the maps of the accelerated ones, which say of a sample that failed that it did."""
    return before | {key: _joined(before.get(key), record) for key, record in records.items()}


def _joined(before: Record | None, record: Record) -> Record:
    """The record with those maps that the one before has of the same sample, too."""
    held = before.maps if before is not None and before.source == record.source else {}
    return replace(record, maps={**held, **record.maps})


def _with_batches(
    split: Split, priors: Sequence[Prior], *, before: Mapping[str, Record], device: str
) -> dict[str, Record]:
    """The records before, with the maps that they lack of priors that take images in batches.

    Which images go together depends on the shard alone, not on what is lacking or cannot be read, so that the same
    maps come out whenever they are made. An error of such a prior is not the fault of a sample, and stops the stage.
    """
    records = dict(before)
    for prior in priors:
        if isinstance(prior, BatchExtractor):
            samples = split.read_shard(0)
            while batch := list(islice(samples, prior.batch_size)):
                pulse()
                records.update(_batch_records(batch, prior, before=records, device=device))
    return records


def _batch_records(
    samples: list[Sample | Unreadable], prior: BatchExtractor, *, before: Mapping[str, Record], device: str
) -> dict[str, Record]:
    """The records, with the map of `prior`, of those samples that lack it and whose image can be read."""
    records = [_own_record(each, before.get(each.key)) if isinstance(each, Sample) else None for each in samples]
    lacking = [
        each is not None and each.bad is None and not _holds(each.maps.get(prior.name), prior) for each in records
    ]
    if not any(lacking):
        return {}
    pictures = _pictures(samples, device=device)
    maps = prior.maps([picture or BLANK for picture in pictures], device=device)
    return {
        record.key: _with_map(record, prior, map_HWC)
        for record, lacks, picture, map_HWC in zip(records, lacking, pictures, maps, strict=True)
        if record is not None and lacks and picture is not None
    }


def _pictures(samples: list[Sample | Unreadable], *, device: str) -> list[ImageViews | None]:
    """The images, none for those that cannot be read; by several threads where an accelerator would wait for one."""
    if device == "cpu":
        return [_picture_or_none(sample) for sample in samples]
    with ThreadPoolExecutor() as threads:
        return list(threads.map(_picture_or_none, samples))


def _picture_or_none(sample: Sample | Unreadable) -> ImageViews | None:
    try:
        return _picture(sample) if isinstance(sample, Sample) else None
    except BrokenImage:  # `_record` meets it again, and says why
        return None


def _with_map(record: Record, prior: BatchExtractor, map_HWC: Map) -> Record:
    if not np.isfinite(map_HWC).all():
        return replace(record, bad=f"the map {prior.name!r} has values that are not finite")
    try:
        return replace(record, maps={**record.maps, prior.name: store(prior, map_HWC)})
    except ValueError as error:  # too large to be stored
        return replace(record, bad=f"the map {prior.name!r}: {error}")


def _record(sample: Sample | Unreadable, priors: Sequence[Prior], *, before: Record | None) -> Record:
    if isinstance(sample, Unreadable):
        return Record.unreadable(sample.key, reason=sample.reason)
    own = _own_record(sample, before)
    if own.bad is not None:
        return _flat_record(own, priors, reason=own.bad)
    missing = [prior for prior in priors if not _holds(own.maps.get(prior.name), prior)]
    if not missing:  # then the image was decoded when its maps were made
        return replace(own, maps={prior.name: own.maps[prior.name] for prior in priors})
    try:
        picture = _picture(sample)
    except BrokenImage as error:
        return Record.unreadable(sample.key, reason=str(error))
    try:
        maps = {**own.maps, **{prior.name: store(prior, prior.map(picture)) for prior in missing}}
    except Exception as error:  # noqa: BLE001 (the one place where a failing prior is survived: it is named and counted)
        return _flat_record(own, priors, reason=f"{type(error).__name__}: {error}")
    return replace(own, maps={prior.name: maps[prior.name] for prior in priors})


def _own_record(sample: Sample, before: Record | None) -> Record:
    """The record before, where it was made of this very sample, else one without a map."""
    source = source_hash(sample)
    return before if before is not None and before.source == source else Record(sample.key, source, {})


def _flat_record(record: Record, priors: Sequence[Prior], *, reason: str) -> Record:
    return replace(record, maps={prior.name: flat(prior) for prior in priors}, bad=reason)


def _holds(stored: StoredMap | None, prior: Extractor) -> bool:
    return stored is not None and stored.fingerprint == fingerprint(prior)


def _picture(sample: Sample) -> ImageViews:
    return ImageViews(decode_image(sample.image), given=sample.given)
