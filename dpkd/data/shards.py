"""The packed data set: its files, and reading it by sample.

<dataset>/
  dataset.json                      `Manifest`; written last, so a folder without it is no data set yet
  <split>-000000.tar                a plain WebDataset tar; the members of a sample follow one another:
      <key>.jpg|png|webp            the image, bytes as they came (other formats as PNG)
      <key>.json                    {"label": 3 or null, "class_name", "group", "source", "attributes": {…}}
      <key>.mask.png                optional, of the image's size
      <key>.expert-<name>.png       optional, any number
  <split>-000000.index.msgpack      `ShardIndex`: columns, one entry a sample; written after its tar

A sample's bytes are checked against the index whenever they are read, because damage inside a JPEG decodes without an
error. Manifest and index have a checksum of their own each, which shows a changed bit of a label.

A key is the path of the image in its source without the extension. Axes: N samples.
"""

import hashlib
import os
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from dpkd.errors import UserError
from dpkd.io import storage
from dpkd.io.errors import NO_FILE
from dpkd.io.record import checked, pack_checked, parse_checked, parse_json, unpack_checked
from dpkd.io.shard_cache import MAX_FILES, MAX_INDEXES, ChecksumDiffers, LRUCache, open_shard

FORMAT_VERSION = 1
MANIFEST_NAME = "dataset.json"
EXPERT_PREFIX = "expert-"
MASK_EXTENSION = "mask.png"
IMAGE_EXTENSIONS = ("jpg", "png", "webp")


class ShardInfo(BaseModel):
    """One shard of a split."""

    model_config = ConfigDict(frozen=True)
    name: str = Field(pattern=r"^\w[\w.-]*\.tar$")
    """A file of the data set's own folder: no path."""
    num_samples: int = Field(ge=0)
    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class SplitInfo(BaseModel):
    """One split: its samples, and how many of each class (in the order of `Manifest.classes`) and without a label."""

    model_config = ConfigDict(frozen=True)
    num_samples: int = Field(ge=0)
    num_unlabelled: int = Field(ge=0)
    class_counts: tuple[int, ...]
    shards: tuple[ShardInfo, ...]


class Manifest(BaseModel):
    """The content of dataset.json."""

    model_config = ConfigDict(frozen=True)
    format_version: int = FORMAT_VERSION
    classes: tuple[str, ...]
    splits: dict[str, SplitInfo]
    image_mean: tuple[float, float, float]
    """RGB, in 0..1, over the pixels of the training split."""
    image_std: tuple[float, float, float]
    num_left_out: int = 0
    """Samples of the source that the splits did not ask for."""
    num_quarantined: int = 0
    made_from: dict[str, str]
    """What the data set was packed from; the same values give the same bytes."""

    def to_bytes(self) -> bytes:
        """The file's content."""
        return checked(self.model_dump(mode="json"))

    @property
    def fingerprint(self) -> str:
        """The checksums of all shards in one: equal for equal data."""
        return storage.digest(
            "".join(shard.sha256 for split in self.splits.values() for shard in split.shards).encode()
        )


@dataclass(frozen=True)
class ShardIndex:
    """The index beside a shard, in columns; an offset of -1 means that the sample has no such member."""

    keys: tuple[str, ...]
    label_N: NDArray[np.int64]
    groups: tuple[str | None, ...]
    members: dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]
    """extension -> (offset of each sample's data, size of it)."""
    shard: ShardInfo
    checksum_N: NDArray[np.uint32]
    """`checksum` of each sample."""
    plan: str = ""
    """Digest of what the shard was to be made from."""
    bad: tuple[tuple[str, str], ...] = ()
    """(item, reason) of what could not be packed."""
    pixel_counts: tuple[tuple[int, ...], ...] = ()
    """For R, G and B: how often each of the 256 values occurs."""

    def to_bytes(self) -> bytes:
        """The file's content."""
        columns = {ext: [offset.tolist(), size.tolist()] for ext, (offset, size) in sorted(self.members.items())}
        return pack_checked(
            {
                "format_version": FORMAT_VERSION,
                "shard": self.shard.model_dump(),
                "plan": self.plan,
                "keys": self.keys,
                "labels": self.label_N.tolist(),
                "groups": self.groups,
                "members": columns,
                "bad": self.bad,
                "pixel_counts": self.pixel_counts,
                "checksums": self.checksum_N.tolist(),
            }
        )

    @staticmethod
    def from_bytes(data: bytes) -> "ShardIndex":
        """Reads the file's content; raises `ValueError` where it is damaged or another file's."""
        content = unpack_checked(data)
        try:
            columns = content["members"].items()
            return ShardIndex(
                **{name: content[name] for name in ("keys", "groups", "plan", "bad", "pixel_counts")},
                label_N=np.array(content["labels"], np.int64),
                members={ext: (np.array(at, np.int64), np.array(size, np.int64)) for ext, (at, size) in columns},
                shard=ShardInfo(**content["shard"]),
                checksum_N=np.array(content["checksums"], np.uint32),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a shard index: {error!r}") from error


def is_given(extension: str) -> bool:
    """True for the members that hold what an expert gave: `mask.png` and `expert-<name>.png`."""
    return extension == MASK_EXTENSION or (extension.startswith(EXPERT_PREFIX) and extension.endswith(".png"))


def given_name(extension: str) -> str:
    """The name of what an expert gave: `mask`, the figure and ground, of mask.png; `<name>` of expert-<name>.png."""
    return extension.removeprefix(EXPERT_PREFIX).removesuffix(".png")


def index_name(shard_name: str) -> str:
    """The file name of a shard's index."""
    return shard_name.removesuffix(".tar") + ".index.msgpack"


class Sample(NamedTuple):
    """One sample as its shard holds it."""

    key: str
    image: bytes
    meta: dict[str, Any]
    given: dict[str, bytes]
    """What an expert gave with the image: image files by `given_name`."""


class Unreadable(NamedTuple):
    """A sample whose bytes are missing or damaged, and why it cannot be read."""

    key: str
    reason: str


@dataclass(frozen=True)
class Dataset:
    """A packed data set, open for reading."""

    url: str
    manifest: Manifest

    @staticmethod
    def open(url: str) -> "Dataset":
        """Reads dataset.json; raises `UserError` without one, or for one that cannot be used."""
        place = storage.join(url, MANIFEST_NAME)
        try:
            manifest = Manifest.model_validate(parse_checked(storage.read_bytes(place)))
        except NO_FILE as error:
            raise UserError(f"no data set at {url}: {MANIFEST_NAME} is missing; pack one first (dpkd pack)") from error
        except ValueError as error:
            raise UserError(
                f"{place} is not a data set's manifest: {error}; restore it from a copy, or remove the folder and pack "
                "it again"
            ) from error
        if (version := manifest.format_version) != FORMAT_VERSION:
            raise UserError(f"{place} has format version {version}, this dpkd reads {FORMAT_VERSION}: pack it again")
        return Dataset(url=url, manifest=manifest)

    def split(self, name: str) -> "Split":
        """The split of that name; raises `UserError` that names the splits there are."""
        if name not in self.manifest.splits:
            known = ", ".join(self.manifest.splits)
            raise UserError(f"the data set at {self.url} has no split {name!r}; it has: {known}")
        return Split(self.url, name, self.manifest.splits[name])

    def given(self) -> dict[str, int]:
        """How many samples came with each map of an expert, by `given_name`."""
        count: Counter[str] = Counter()
        for index in (index for name in self.manifest.splits for index in self.split(name).indexes()):
            for extension, (offset_N, _) in index.members.items():
                if is_given(extension):
                    count[given_name(extension)] += int((offset_N >= 0).sum())
        return dict(sorted(count.items()))


class Split:
    """The samples of one split by number, in the order of the shards.

    Pickles small: indexes and files are opened again where they are used.
    """

    def __init__(self, url: str, name: str, info: SplitInfo) -> None:
        self.url = url
        self.name = name
        self.info = info
        self.num_samples = info.num_samples
        self.shard_sizes = [shard.num_samples for shard in info.shards]
        self._start_of = list(accumulate(self.shard_sizes, initial=0))
        self._files: LRUCache[int] = LRUCache(MAX_FILES, on_evict=os.close)
        self._indexes: LRUCache[ShardIndex] = LRUCache(MAX_INDEXES)
        self._fault_of: dict[int, str | None] = {}

    @property
    def keys(self) -> list[str]:
        """The key of every sample."""
        return [key for index in self.indexes() for key in index.keys]

    @cached_property
    def label_N(self) -> NDArray[np.int64]:  # noqa: N802 (the axis)
        """The class of every sample, as its place in `Manifest.classes`; -1 without a label."""
        return np.concatenate([np.empty(0, np.int64), *(index.label_N for index in self.indexes())])

    def index(self, k: int) -> ShardIndex:
        """The index of shard `k`; raises `UserError` where it is missing or does not belong to its shard."""
        return self._indexes.get(k, self._read_index)

    def indexes(self) -> Iterator[ShardIndex]:
        """The index of every shard, one after the other: a large split's do not fit the memory together."""
        return (self.index(k) for k in range(len(self.info.shards)))

    def locate(self, i: int) -> tuple[int, int]:
        """(shard number, position in the shard) of sample `i`."""
        if not 0 <= i < self.num_samples:
            raise IndexError(f"sample {i} of split {self.name!r}, which has {self.num_samples}")
        shard = bisect_right(self._start_of, i) - 1
        return shard, i - self._start_of[shard]

    def read(self, i: int) -> Sample:
        """Sample `i`; raises `UserError` that names shard and key where its bytes are missing or damaged."""
        sample = self._read(*self.locate(i))
        if isinstance(sample, Unreadable):
            raise UserError(f"{self.describe(i)}: {sample.reason}; restore the shard, or pack the images again")
        return sample

    def describe(self, i: int) -> str:
        """The shard and the key of sample `i`, for messages."""
        shard, row = self.locate(i)
        return f"{self._place(shard)}, sample {self.index(shard).keys[row]!r}"

    def read_shard(self, k: int) -> Iterator[Sample | Unreadable]:
        """The samples of shard `k`, in order, with the reason in the place of one that cannot be read.

        Where the file has a fault, a sample is read if its own bytes are as they were packed. A remote shard is fetched
        whole or not at all.
        """
        index, fault = self.index(k), self.fault(k)
        fetched = fault is None or storage.local_path(self._place(k)) is not None
        for row, key in enumerate(index.keys):
            yield self._read(k, row) if fetched else Unreadable(key, f"its shard is damaged: {fault}")

    def fault(self, k: int) -> str | None:
        """Why the file of shard `k` is not the one that dataset.json lists, None where it is; reads all of it once.

        Raises `UserError` where it is missing.
        """
        if k not in self._fault_of:
            info, digest, size_bytes = self.info.shards[k], hashlib.sha256(), 0
            try:
                descriptor = self._files.get(k, self._open)
                while block := os.pread(descriptor, 1 << 20, size_bytes):
                    digest.update(block)
                    size_bytes += len(block)
            except ChecksumDiffers:  # of a remote shard, of which no copy is kept
                size_bytes = info.size_bytes
            fault = None if digest.hexdigest() == info.sha256 else "its checksum differs from the one in dataset.json"
            if size_bytes < info.size_bytes:
                fault = f"it is cut short: {size_bytes:,} of {info.size_bytes:,} bytes are there"
            self._fault_of[k] = fault
        return self._fault_of[k]

    def __reduce__(self) -> tuple[Any, ...]:
        return Split, (self.url, self.name, self.info)

    def _place(self, shard: int) -> str:
        return storage.join(self.url, self.info.shards[shard].name)

    def _read(self, shard: int, row: int) -> Sample | Unreadable:
        index = self.index(shard)
        key = index.keys[row]
        spans = {ext: (int(at[row]), int(size[row])) for ext, (at, size) in index.members.items() if at[row] >= 0}
        start, end = min(at for at, _ in spans.values()), max(at + size for at, size in spans.values())
        block = read_span(self._files.get(shard, self._open), start, end - start)
        if len(block) < end - start:
            return Unreadable(key, f"the shard is cut short: {len(block):,} of {end - start:,} bytes are there")
        members = {ext: block[at - start : at - start + size] for ext, (at, size) in spans.items()}
        if checksum(members) != index.checksum_N[row]:
            return Unreadable(key, "its bytes are not those that were packed (their checksum differs)")
        return Sample(
            key=key,
            image=next(members[extension] for extension in IMAGE_EXTENSIONS if extension in members),
            meta=parse_json(members["json"]),
            given={given_name(ext): data for ext, data in members.items() if is_given(ext)},
        )

    def _read_index(self, shard: int) -> ShardIndex:
        info = self.info.shards[shard]
        place = storage.join(self.url, index_name(info.name))
        with _named(place):
            index = ShardIndex.from_bytes(storage.read_bytes(place))
            if index.shard != info:
                raise ValueError(f"it does not belong to the {info.name} that {MANIFEST_NAME} lists")
            return index

    def _open(self, shard: int) -> int:
        info, place = self.info.shards[shard], self._place(shard)
        with _named(place):
            return open_shard(place, size_bytes=info.size_bytes, sha256_hex=info.sha256)


@contextmanager
def _named(place: str) -> Iterator[None]:
    """Names a file of a data set that is missing or damaged."""
    try:
        yield
    except NO_FILE as error:
        raise UserError(f"{place} is missing; {MANIFEST_NAME} needs it: pack or copy it again") from error
    except ValueError as error:
        raise UserError(f"{place} cannot be read: {error}; pack or copy it again") from error


def checksum(members: dict[str, bytes]) -> int:
    """CRC-32 of all members of a sample, in the order of their extensions."""
    crc = 0
    for extension in sorted(members):
        crc = zlib.crc32(members[extension], crc)
    return crc


def read_span(descriptor: int, offset: int, size: int) -> bytes:
    """`size` bytes of an open file from `offset`; fewer, and no more memory, where the file ends before."""
    return os.pread(descriptor, max(0, min(size, os.fstat(descriptor).st_size - offset)), offset)
