"""Writes one shard and its index in a pool worker; restartable, with identical bytes each time."""

import json
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dpkd.data.image_headers import BrokenImage
from dpkd.data.images import check_image, check_mask
from dpkd.data.settings import Window
from dpkd.data.shards import FORMAT_VERSION, MASK_EXTENSION, ShardIndex, ShardInfo, checksum, given_name, index_name
from dpkd.data.sources.records import Blob, Record
from dpkd.data.tars import Member, TarWriter
from dpkd.io import storage
from dpkd.io.errors import NO_FILE
from dpkd.launch.heartbeat import pulse


@dataclass(frozen=True)
class Planned:
    """A sample with its key and label in the data set."""

    key: str
    label: int | tuple[int, ...]
    """Of each class 1, 0, or -1 for unknown, where an image may have several labels."""
    record: Record

    @property
    def meta(self) -> dict[str, Any]:
        """The content of the sample's json member."""
        of_several = {"labels": self.record.labels} if isinstance(self.label, tuple) else {}
        return {
            "label": self.label if isinstance(self.label, int) and self.label >= 0 else None,
            **of_several,
            "class_name": self.record.class_name,
            "group": self.record.group,
            "source": self.record.name,
            "attributes": self.record.attributes,
        }


@dataclass(frozen=True)
class ShardJob:
    """A shard to write."""

    url: str
    """URL of the data set."""
    split: str
    name: str
    samples: tuple[Planned, ...]
    window: Window | None = None

    @property
    def plan(self) -> str:
        """Digest of the shard's inputs that are known before the images are read."""
        samples = []
        for sample in self.samples:
            given = dict(_given(sample.record))
            mask = given.pop(MASK_EXTENSION, None)
            experts = [[given_name(extension), blob.size] for extension, blob in given.items()]
            samples.append([sample.key, sample.meta, sample.record.image.size, mask and mask.size, experts])
        parts: list[Any] = [FORMAT_VERSION, self.name, samples]
        if self.window is not None:
            parts.append([self.window.low, self.window.high])
        return storage.digest(_json(parts))

    def __repr__(self) -> str:
        return f"{self.name} ({len(self.samples)} samples)"


def write_shard(job: ShardJob) -> ShardIndex:
    """Writes the shard, then its index, unless both are whole already; returns the index.

    Raises `StorageError` if the files cannot be written.
    """
    shard_url, index_url = storage.join(job.url, job.name), storage.join(job.url, index_name(job.name))
    if (finished := _finished(job, shard_url, index_url)) is not None:
        return finished
    cv2.setNumThreads(1)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # broken images are reported by name
    samples: list[Planned] = []
    rows: list[dict[str, Member]] = []
    checksums: list[int] = []
    bad: list[tuple[str, str]] = []
    pixel_counts = np.zeros((3, 256), np.int64)
    with storage.open_atomic(shard_url) as file:
        writer = TarWriter(file)
        for sample in job.samples:
            pulse()
            try:
                members, image_HWC = _members(sample, job.window)
            except BrokenImage as error:
                bad.append((sample.record.name, str(error)))
                continue
            samples.append(sample)
            checksums.append(checksum(members))
            rows.append({ext: writer.add(f"{sample.key}.{ext}", data) for ext, data in members.items()})
            for channel in range(3):
                pixel_counts[channel] += np.bincount(image_HWC[:, :, channel].ravel(), minlength=256)
        writer.finish()
    columns = {}
    for ext in sorted({ext for row in rows for ext in row}):
        spans = np.array([row.get(ext, Member("", -1, 0))[1:] for row in rows], np.int64)
        columns[ext] = spans[:, 0], spans[:, 1]
    index = ShardIndex(
        keys=tuple(sample.key for sample in samples),
        label_N=np.array([sample.label for sample in samples], np.int64),
        members=columns,
        shard=ShardInfo(name=job.name, num_samples=len(rows), size_bytes=writer.size_bytes, sha256=writer.sha256),
        plan=job.plan,
        bad=tuple(bad),
        pixel_counts=tuple(tuple(counts) for counts in pixel_counts.tolist()),
        checksum_N=np.array(checksums, np.uint32),
    )
    storage.write_bytes_atomic(index_url, index.to_bytes())
    return index


def _finished(job: ShardJob, shard_url: str, index_url: str) -> ShardIndex | None:
    """The index of a complete shard of the same plan; None if the shard must be written."""
    try:
        index = ShardIndex.from_bytes(storage.read_bytes(index_url))
        is_whole = index.plan == job.plan and storage.size(shard_url) == index.shard.size_bytes
        if is_whole and storage.local_path(shard_url) is not None:
            is_whole = storage.sha256(shard_url) == index.shard.sha256
    except (*NO_FILE, ValueError):
        return None
    return index if is_whole else None


def _members(sample: Planned, window: Window | None) -> tuple[dict[str, bytes], NDArray[np.uint8]]:
    """Extension -> bytes in the order of the tar, and the decoded image; raises `BrokenImage` with the reason."""
    image = check_image(sample.record.image.read(), window=window)
    members = {image.extension: image.data, "json": _json(sample.meta)}
    height, width = image.image_HWC.shape[:2]
    for extension, blob in _given(sample.record):
        try:
            members[extension] = check_mask(blob.read(), height=height, width=width)
        except BrokenImage as error:
            name = "mask" if extension == MASK_EXTENSION else f"expert map {given_name(extension)}"
            raise BrokenImage(f"{name}: {error}") from error
    return members, image.image_HWC


def _given(record: Record) -> list[tuple[str, Blob]]:
    """The expert's maps in the order of the tar: the mask first."""
    return sorted(record.given.items(), key=lambda item: (item[0] != MASK_EXTENSION, item[0]))


def _json(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, default=str).encode()
