"""Writing one shard and its index: the work of one pool worker, restartable and the same to the byte each time."""

import json
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from dpkd.data.image_headers import BrokenImage
from dpkd.data.images import check_image, check_mask
from dpkd.data.settings import Window
from dpkd.data.shards import EXPERT_PREFIX, FORMAT_VERSION, ShardIndex, ShardInfo, checksum, index_name
from dpkd.data.sources.records import Record
from dpkd.data.tars import Member, TarWriter
from dpkd.io import storage
from dpkd.io.errors import NO_FILE
from dpkd.launch.heartbeat import pulse


@dataclass(frozen=True)
class Planned:
    """A sample with its place in the data set."""

    key: str
    label: int
    record: Record

    @property
    def meta(self) -> dict[str, Any]:
        """The content of the sample's json member."""
        return {
            "label": self.label if self.label >= 0 else None,
            "class_name": self.record.class_name,
            "group": self.record.group,
            "source": self.record.name,
            "attributes": self.record.attributes,
        }

    def digest_part(self) -> list[Any]:
        """All that decides the sample's bytes in the shard, as far as it is known before the image is read."""
        experts = [[name, blob.size] for name, blob in self.record.experts]
        mask = None if self.record.mask is None else self.record.mask.size
        return [self.key, self.meta, self.record.image.size, mask, experts]


@dataclass(frozen=True)
class ShardJob:
    """A shard to write."""

    url: str
    """The data set."""
    split: str
    name: str
    samples: tuple[Planned, ...]
    window: Window | None = None

    @property
    def plan(self) -> str:
        """Digest of what the shard is to be made from."""
        parts: list[Any] = [FORMAT_VERSION, self.name, [sample.digest_part() for sample in self.samples]]
        if self.window is not None:
            parts.append([self.window.low, self.window.high])
        return storage.digest(_json(parts))

    def __repr__(self) -> str:
        return f"{self.name} ({len(self.samples)} samples)"


@dataclass(frozen=True)
class _Row:
    """A sample as it was written."""

    planned: Planned
    checksum: int
    members: dict[str, Member]


def write_shard(job: ShardJob) -> ShardIndex:
    """Writes the shard, then its index, unless both are whole already; returns the index.

    Raises `StorageError` where the place cannot be written.
    """
    if (finished := finished_shard(job)) is not None:
        return finished
    cv2.setNumThreads(1)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # broken images are reported by name
    rows: list[_Row] = []
    bad: list[tuple[str, str]] = []
    pixel_counts = np.zeros((3, 256), np.int64)
    with storage.open_atomic(storage.join(job.url, job.name)) as file:
        writer = TarWriter(file)
        for sample in job.samples:
            pulse()
            try:
                members, image_HWC = _members(sample, job.window)
            except BrokenImage as error:
                bad.append((sample.record.name, str(error)))
                continue
            written = {extension: writer.add(f"{sample.key}.{extension}", data) for extension, data in members.items()}
            rows.append(_Row(sample, checksum(members), written))
            for channel in range(3):
                pixel_counts[channel] += np.bincount(image_HWC[:, :, channel].ravel(), minlength=256)
        writer.finish()
    index = ShardIndex(
        keys=tuple(row.planned.key for row in rows),
        label_N=np.array([row.planned.label for row in rows], np.int64),
        groups=tuple(row.planned.record.group for row in rows),
        members=_member_columns(rows),
        shard=ShardInfo(name=job.name, num_samples=len(rows), size_bytes=writer.size_bytes, sha256=writer.sha256),
        plan=job.plan,
        bad=tuple(bad),
        pixel_counts=tuple(tuple(counts) for counts in pixel_counts.tolist()),
        checksum_N=np.array([row.checksum for row in rows], np.uint32),
    )
    storage.write_bytes_atomic(storage.join(job.url, index_name(job.name)), index.to_bytes())
    return index


def finished_shard(job: ShardJob) -> ShardIndex | None:
    """The index of a shard that is whole and was made from the same plan; None where it must be written."""
    place = storage.join(job.url, job.name)
    try:
        index = ShardIndex.from_bytes(storage.read_bytes(storage.join(job.url, index_name(job.name))))
        if index.plan != job.plan or storage.size(place) != index.shard.size_bytes:
            return None
    except (*NO_FILE, ValueError):
        return None
    local = storage.local_path(place)
    if local is not None and (not local.is_file() or storage.sha256(local) != index.shard.sha256):
        return None
    return index


def _members(sample: Planned, window: Window | None) -> tuple[dict[str, bytes], npt.NDArray[np.uint8]]:
    """Extension -> bytes, in the order of the tar, and the decoded image; raises `BrokenImage` with the reason."""
    record = sample.record
    image = check_image(record.image.read(), window=window)
    members = {image.extension: image.data, "json": _json(sample.meta)}
    masks = [("mask", "mask.png", record.mask)] if record.mask is not None else []
    masks += [(f"expert map {name}", f"{EXPERT_PREFIX}{name}.png", blob) for name, blob in record.experts]
    height, width = image.image_HWC.shape[:2]
    for name, extension, blob in masks:
        try:
            members[extension] = check_mask(blob.read(), height=height, width=width)
        except BrokenImage as error:
            raise BrokenImage(f"{name}: {error}") from error
    return members, image.image_HWC


def _member_columns(rows: list[_Row]) -> dict[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Extension -> (offset of each sample's member, size of it)."""
    columns = {}
    for extension in sorted({extension for row in rows for extension in row.members}):
        members = [row.members.get(extension, Member("", -1, 0)) for row in rows]
        offset_N = np.array([member.offset for member in members], np.int64)
        columns[extension] = offset_N, np.array([member.size for member in members], np.int64)
    return columns


def _json(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, default=str).encode()
