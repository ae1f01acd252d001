"""The packed data set: its files, and a reader by sample.

<dataset>/
  dataset.json                      `Manifest`; written last, so a folder without it is not yet a data set
  <split>-000000.tar                a plain WebDataset tar; the members of a sample follow one another:
      <key>.jpg|png|webp            the image with its original bytes (other formats as PNG)
      <key>.json                    {"label": 3 or null, "class_name", "group", "source", "attributes": {…}}; where an
                                    image may have several labels, "labels": {name: 1, 0 or -1} or null
      <key>.mask.png                optional, the size of the image
      <key>.expert-<name>.png       optional, any number of them
  <split>-000000.index.msgpack      `ShardIndex`: columns, one entry a sample; written after its tar
  <split>.labels.npy                the label of every sample, in the order of the shards; -1 without a label; int16 or
                                    int32, mapped into memory, so that opening reads no index of a shard; int8 NK where
                                    an image may have several: 1, 0, or -1 for unknown

Each read compares the sample's bytes with the checksum of the index, because a damaged JPEG may decode without error.
Manifest and index contain a checksum of their content, which detects a changed bit of a label.

A key is the path of the image in its source without the extension. Axes: N samples, K classes.
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
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from dpkd.data.labels import FileInfo, Labels, label_known, read_labels
from dpkd.data.sample import Sample, Unreadable
from dpkd.errors import UserError
from dpkd.io import storage
from dpkd.io.errors import NO_FILE
from dpkd.io.record import checked, pack_checked, parse_checked, unpack_checked
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
    """A file name in the data set's folder, without a path."""
    num_samples: int = Field(ge=0)
    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class SplitInfo(BaseModel):
    """One split: numbers of samples in all, without a label, and of each class (in the order of `Manifest.classes`).

    Where an image may have several labels, without a known label, and with each label.
    """

    model_config = ConfigDict(frozen=True)
    num_samples: int = Field(ge=0)
    num_unlabelled: int = Field(ge=0)
    class_counts: tuple[int, ...]
    shards: tuple[ShardInfo, ...]
    labels: FileInfo | None = None
    """None if an older version packed the images: then the labels are read from every shard's index."""
    multi_label: bool = False
    """True if an image may have several labels: the classes."""


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
    """Samples of the source that belong to no split."""
    made_from: dict[str, str]
    """The inputs of packing; the same values give the same bytes."""

    def to_bytes(self) -> bytes:
        """The file's content."""
        return checked(self.model_dump(mode="json"))

    @property
    def fingerprint(self) -> str:
        """One checksum of all shards: equal for equal data."""
        return storage.digest(
            "".join(shard.sha256 for split in self.splits.values() for shard in split.shards).encode()
        )


@dataclass(frozen=True)
class ShardIndex:
    """The index beside a shard, in columns; an offset of -1 means that the sample has no such member."""

    keys: tuple[str, ...]
    label_N: NDArray[np.int64]
    """NK where an image may have several labels."""
    members: dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]
    """extension -> (offset, size) of each sample's data."""
    shard: ShardInfo
    checksum_N: NDArray[np.uint32]
    """`checksum` of each sample."""
    plan: str = ""
    """Digest of the inputs planned for the shard."""
    bad: tuple[tuple[str, str], ...] = ()
    """(item, reason) of the items that were not packed."""
    pixel_counts: tuple[tuple[int, ...], ...] = ()
    """Histograms of R, G and B, each of 256 values."""

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
                "members": columns,
                "bad": self.bad,
                "pixel_counts": self.pixel_counts,
                "checksums": self.checksum_N.tolist(),
            }
        )

    @staticmethod
    def from_bytes(data: bytes) -> "ShardIndex":
        """Reads the file's content; raises `ValueError` if it is damaged or not a shard index."""
        content = unpack_checked(data)
        try:
            columns = content["members"].items()
            return ShardIndex(
                **{name: content[name] for name in ("keys", "plan", "bad", "pixel_counts")},
                label_N=np.array(content["labels"], np.int64),
                members={ext: (np.array(at, np.int64), np.array(size, np.int64)) for ext, (at, size) in columns},
                shard=ShardInfo(**content["shard"]),
                checksum_N=np.array(content["checksums"], np.uint32),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a shard index: {error!r}") from error


def is_given(extension: str) -> bool:
    """True for the members with an expert's map: `mask.png` and `expert-<name>.png`."""
    return extension == MASK_EXTENSION or (extension.startswith(EXPERT_PREFIX) and extension.endswith(".png"))


def given_name(extension: str) -> str:
    """The name of an expert's map: `mask` (figure and ground) for mask.png, `<name>` for expert-<name>.png."""
    return extension.removeprefix(EXPERT_PREFIX).removesuffix(".png")


def index_name(shard_name: str) -> str:
    """The file name of a shard's index."""
    return shard_name.removesuffix(".tar") + ".index.msgpack"


@dataclass(frozen=True)
class Dataset:
    """A packed data set, open for reading."""

    url: str
    manifest: Manifest

    @staticmethod
    def open(url: str) -> "Dataset":
        """Reads dataset.json; raises `UserError` if it is missing or cannot be used."""
        manifest_url = storage.join(url, MANIFEST_NAME)
        try:
            manifest = Manifest.model_validate(parse_checked(storage.read_bytes(manifest_url)))
        except NO_FILE as error:
            raise UserError(f"no data set at {url}: {MANIFEST_NAME} is missing; pack one first (dpkd pack)") from error
        except ValueError as error:
            raise UserError(
                f"{manifest_url} is not the manifest of a data set: {error}; restore it from a copy, or remove the "
                "folder and pack the images again"
            ) from error
        if (version := manifest.format_version) != FORMAT_VERSION:
            raise UserError(
                f"{manifest_url} has format version {version}, and dpkd reads {FORMAT_VERSION}: pack the images again"
            )
        return Dataset(url=url, manifest=manifest)

    def split(self, name: str) -> "Split":
        """The split of that name; raises `UserError` with the existing names."""
        if name not in self.manifest.splits:
            known = ", ".join(self.manifest.splits)
            raise UserError(f"the data set at {self.url} has no split {name!r}; it has: {known}")
        return Split(self.url, name, self.manifest.splits[name])

    def given(self) -> dict[str, int]:
        """Number of samples with each map of an expert, by `given_name`."""
        count: Counter[str] = Counter()
        for index in (index for name in self.manifest.splits for index in self.split(name).indexes()):
            for extension, (offset_N, _) in index.members.items():
                if is_given(extension):
                    count[given_name(extension)] += int((offset_N >= 0).sum())
        return dict(sorted(count.items()))


class Split:
    """The samples of one split by number, in the order of the shards.

    A pickle is small: the process that unpickles it opens indexes and files again.
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
        return list(self.iter_keys())

    def iter_keys(self) -> Iterator[str]:
        """The key of every sample; reads the index of a shard when its first key is asked for."""
        return (key for index in self.indexes() for key in index.keys)

    @cached_property
    def label_N(self) -> Labels:  # noqa: N802 (the axis)
        """The class of every sample, as an index into `Manifest.classes`; -1 without a label. Read only.

        Where an image may have several labels, 0 for every sample with a known one. The processes of a machine share
        its memory. Raises `UserError` if its file is missing or damaged.
        """
        if self.info.multi_label:
            return label_known(self.label_NK)
        if self.info.labels is None:
            return np.concatenate([np.empty(0, np.int64), *(index.label_N for index in self.indexes())])
        return self._labels((self.num_samples,))

    @cached_property
    def label_NK(self) -> Labels:  # noqa: N802 (the axes)
        """1 for the labels of every sample, 0 for those that it lacks, -1 for unknown ones; as `label_N`."""
        return self._labels((self.num_samples, len(self.info.class_counts)))

    @property
    def labels(self) -> Labels:
        """`label_NK` where an image may have several labels, else `label_N`."""
        return self.label_NK if self.info.multi_label else self.label_N

    def _labels(self, shape: tuple[int, ...]) -> Labels:
        assert self.info.labels is not None, "only older versions wrote no file of labels"
        url = storage.join(self.url, self.info.labels.name)
        with _user_errors(url):
            return read_labels(url, self.info.labels, shape=shape)

    def index(self, k: int) -> ShardIndex:
        """The index of shard `k`; raises `UserError` if it is missing or belongs to another shard."""
        return self._indexes.get(k, self._read_index)

    def indexes(self) -> Iterator[ShardIndex]:
        """The index of every shard, one at a time: memory does not fit all indexes of a large split."""
        return (self.index(k) for k in range(len(self.info.shards)))

    def locate(self, i: int) -> tuple[int, int]:
        """(shard number, position in the shard) of sample `i`."""
        if not 0 <= i < self.num_samples:
            raise IndexError(f"sample {i} of split {self.name!r}, which has {self.num_samples}")
        shard = bisect_right(self._start_of, i) - 1
        return shard, i - self._start_of[shard]

    def read(self, i: int) -> Sample:
        """Sample `i`; raises `UserError` with shard and key if its bytes are missing or damaged."""
        sample = self._read(*self.locate(i))
        if isinstance(sample, Unreadable):
            raise UserError(f"{self.describe(i)}: {sample.reason}; restore the shard, or pack the images again")
        return sample

    def describe(self, i: int) -> str:
        """The shard and the key of sample `i`, for messages."""
        shard, row = self.locate(i)
        return f"{self._url(shard)}, sample {self.index(shard).keys[row]!r}"

    def read_shard(self, k: int) -> Iterator[Sample | Unreadable]:
        """The samples of shard `k`, in order; an unreadable sample is replaced by the reason.

        Undamaged samples of a damaged file are read. A remote shard is fetched whole or not at all.
        """
        index, fault = self.index(k), self.fault(k)
        fetched = fault is None or storage.local_path(self._url(k)) is not None
        for row, key in enumerate(index.keys):
            yield self._read(k, row) if fetched else Unreadable(key, f"its shard is damaged: {fault}")

    def fault(self, k: int) -> str | None:
        """The difference between the file of shard `k` and its entry in dataset.json, None without one.

        Reads the whole file, once. Raises `UserError` if it is missing.
        """
        if k not in self._fault_of:
            info, digest, size_bytes = self.info.shards[k], hashlib.sha256(), 0
            try:
                descriptor = self._files.get(k, self._open)
                while block := os.pread(descriptor, 1 << 20, size_bytes):
                    digest.update(block)
                    size_bytes += len(block)
            except ChecksumDiffers:  # a remote shard: no local copy is kept
                size_bytes = info.size_bytes
            fault = None if digest.hexdigest() == info.sha256 else "its checksum differs from the one in dataset.json"
            if size_bytes < info.size_bytes:
                fault = f"it is cut short: it has {size_bytes:,} of {info.size_bytes:,} bytes"
            self._fault_of[k] = fault
        return self._fault_of[k]

    def __reduce__(self) -> tuple[Any, ...]:
        return Split, (self.url, self.name, self.info)

    def _url(self, shard: int) -> str:
        return storage.join(self.url, self.info.shards[shard].name)

    def _read(self, shard: int, row: int) -> Sample | Unreadable:
        index = self.index(shard)
        key = index.keys[row]
        spans = {ext: (int(at[row]), int(size[row])) for ext, (at, size) in index.members.items() if at[row] >= 0}
        start, end = min(at for at, _ in spans.values()), max(at + size for at, size in spans.values())
        block = read_span(self._files.get(shard, self._open), start, end - start)
        if len(block) < end - start:
            return Unreadable(key, f"the shard is cut short: it has {len(block):,} of {end - start:,} bytes")
        members = {ext: block[at - start : at - start + size] for ext, (at, size) in spans.items()}
        if checksum(members) != index.checksum_N[row]:
            return Unreadable(key, "its bytes changed after packing (the checksum differs)")
        return Sample(
            key=key,
            image=next(members[extension] for extension in IMAGE_EXTENSIONS if extension in members),
            json=members["json"],
            given={given_name(ext): data for ext, data in members.items() if is_given(ext)},
        )

    def _read_index(self, shard: int) -> ShardIndex:
        info = self.info.shards[shard]
        index_url = storage.join(self.url, index_name(info.name))
        with _user_errors(index_url):
            index = ShardIndex.from_bytes(storage.read_bytes(index_url))
            if index.shard != info:
                raise ValueError(f"it does not belong to the {info.name} of {MANIFEST_NAME}")
            return index

    def _open(self, shard: int) -> int:
        info, shard_url = self.info.shards[shard], self._url(shard)
        with _user_errors(shard_url):
            return open_shard(shard_url, size_bytes=info.size_bytes, sha256_hex=info.sha256)


@contextmanager
def _user_errors(url: str) -> Iterator[None]:
    """Raises `UserError` with the URL if the file is missing or damaged."""
    try:
        yield
    except NO_FILE as error:
        raise UserError(f"{url} is missing, but {MANIFEST_NAME} lists it: pack again or copy the file") from error
    except ValueError as error:
        raise UserError(f"{url} cannot be read: {error}; pack again or copy the file") from error


def checksum(members: dict[str, bytes]) -> int:
    """CRC-32 of all members of a sample, in the order of their extensions."""
    crc = 0
    for extension in sorted(members):
        crc = zlib.crc32(members[extension], crc)
    return crc


def read_span(descriptor: int, offset: int, size: int) -> bytes:
    """`size` bytes of an open file from `offset`; fewer, without more memory, if the file ends earlier."""
    return os.pread(descriptor, max(0, min(size, os.fstat(descriptor).st_size - offset)), offset)
