"""A prior set on disk: a hash binds maps to their image, so no other image gets them.

<dataset>/priors/<set>/
  priors.json                   `PriorManifest`; written last, so a folder without it is not a complete set
  <split>-000000.tar            one member a sample, <key>.priors.msgpack (`dpkd.priors.record`), in the order of the
                                image shard of that name
  <split>-000000.index.msgpack  `PriorIndex`: written after its tar, with the checksum of the tar

Manifest and index also contain a checksum of their content.
"""

import os
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from dpkd.data.sample import Sample
from dpkd.data.shards import Dataset, ShardInfo, index_name, read_span
from dpkd.errors import UserError
from dpkd.io import storage
from dpkd.io.errors import NO_FILE
from dpkd.io.record import pack_checked, parse_checked, unpack_checked
from dpkd.io.shard_cache import MAX_FILES, MAX_INDEXES, LRUCache, open_shard
from dpkd.priors import Prior
from dpkd.priors.base import fingerprint
from dpkd.priors.codecs import Map
from dpkd.priors.derived import Derived, derivable
from dpkd.priors.record import Record, source_hash

FORMAT_VERSION = 3
MANIFEST_NAME = "priors.json"
WAY_OUT = "run the prepare stage again (dpkd prepare)"


class PriorMismatch(UserError):
    """The maps are damaged, or belong to another image or another prior."""


class PriorManifest(BaseModel):
    """The content of priors.json."""

    model_config = ConfigDict(frozen=True)
    format_version: int = FORMAT_VERSION
    dataset: str
    """Fingerprint of the data set of the images."""
    priors: tuple[Prior, ...]
    fingerprints: dict[str, str]
    """name -> fingerprint of the prior, including the code version."""
    splits: dict[str, tuple[ShardInfo, ...]]
    unreadable: dict[str, tuple[int, ...]]
    """split -> numbers of the unreadable samples, ascending: later stages skip them."""
    num_flat: int = 0
    """Readable samples with flat maps, because their maps could not be computed."""


@dataclass(frozen=True)
class PriorIndex:
    """The index beside a prior shard."""

    shard: ShardInfo
    images: str
    """SHA-256 of the image shard."""
    fingerprints: dict[str, str]
    """name -> fingerprint of the prior of each map, in the order of the settings."""
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    bad: tuple[tuple[str, str], ...] = ()
    """(key, reason) of samples with flat maps, and of unreadable samples."""
    unreadable: tuple[int, ...] = ()
    """Numbers of the unreadable samples of the shard, from 0."""
    fault: str | None = None
    """The fault of the image shard's file, if any; samples with a correct checksum have their maps."""

    def to_bytes(self) -> bytes:
        """The file's content."""
        return pack_checked({"format_version": FORMAT_VERSION, **vars(self), "shard": self.shard.model_dump()})

    @staticmethod
    def from_bytes(data: bytes) -> "PriorIndex":
        """Reads the file's content; raises ValueError if it is not a prior index."""
        content = unpack_checked(data)
        if content.pop("format_version", None) != FORMAT_VERSION:
            raise ValueError("it has another format version")
        known = {field.name: content[field.name] for field in fields(PriorIndex)}
        return PriorIndex(**{**known, "shard": ShardInfo(**content["shard"])})


@dataclass(frozen=True)
class PriorSet:
    """A complete prior set, open for reading."""

    url: str
    manifest: PriorManifest

    @staticmethod
    def open(dataset_url: str, name: str) -> "PriorSet":
        """Opens the set `name` of a data set; raises `UserError` if it is incomplete or for other images."""
        url = set_url(dataset_url, name)
        manifest = read_manifest(url)
        if manifest is None:
            raise UserError(f"no complete prior set at {url}: {MANIFEST_NAME} is missing or cannot be read; {WAY_OUT}")
        if manifest.dataset != Dataset.open(dataset_url).manifest.fingerprint:
            raise UserError(f"the prior set at {url} was prepared from other images than {dataset_url}; {WAY_OUT}")
        if manifest.fingerprints != fingerprints(manifest.priors):
            raise UserError(f"the prior set at {url} was prepared by another version of dpkd; {WAY_OUT}")
        return PriorSet(url=url, manifest=manifest)

    @property
    def channels(self) -> dict[str, int]:
        """Channels of each map by name, including derived maps."""
        return {name: one.channels for name, one in _with_derived(self.manifest.priors).items()}

    def split(self, name: str) -> "PriorSplit":
        """The maps of the split `name`; raises `UserError` with the existing names."""
        if name not in self.manifest.splits:
            known = ", ".join(self.manifest.splits)
            raise UserError(f"the prior set at {self.url} has no split {name!r}; it has: {known}")
        priors = self.manifest.priors
        return PriorSplit(self.url, priors, self.manifest.splits[name], tuple(prior.name for prior in priors))

    def unreadable(self, split: str) -> npt.NDArray[np.int64]:
        """Numbers of the samples of a split that could not be read for their maps, ascending."""
        return np.array(self.manifest.unreadable[split], np.int64)


@dataclass(eq=False)
class PriorSplit:
    """The maps of one split by sample number. A pickle is small: the process that unpickles it opens files again."""

    url: str
    priors: tuple[Prior, ...]
    shards: tuple[ShardInfo, ...]
    names: tuple[str, ...]
    """The maps that `read` returns."""

    def __post_init__(self) -> None:
        self._fingerprints = fingerprints(self.priors)
        self._derived = derivable(self._fingerprints)
        self._kind_of = _with_derived(self.priors)
        needed = {need for name in self.names if name in self._derived for need in self._derived[name].needs}
        self._decoded = {*self.names, *needed} - {*self._derived}
        self._start_of = list(accumulate((shard.num_samples for shard in self.shards), initial=0))
        self._files: LRUCache[int] = LRUCache(MAX_FILES, on_evict=os.close)
        self._indexes: LRUCache[PriorIndex] = LRUCache(MAX_INDEXES)

    def __reduce__(self) -> tuple[Any, ...]:
        return PriorSplit, (self.url, self.priors, self.shards, self.names)

    def only(self, names: Iterable[str]) -> "PriorSplit":
        """The same split with only these maps, which may be derived; other maps are not decoded.

        Raises `UserError` with the existing names for an unknown map.
        """
        wanted = tuple(dict.fromkeys(names))
        for name in wanted:
            if name not in self._kind_of:
                raise UserError(f"the prior set at {self.url} has no map {name!r}; it has: {', '.join(self._kind_of)}")
        return PriorSplit(self.url, self.priors, self.shards, wanted)

    @property
    def digests(self) -> dict[str, str]:
        """The fingerprint of each prior whose map is read, by name."""
        return {name: digest for name, digest in self._fingerprints.items() if name in self._decoded}

    @property
    def num_channels(self) -> int:
        """Number of channels of the maps."""
        return sum(self._kind_of[name].channels for name in self.names)

    def read(self, i: int, sample: Sample) -> dict[str, Map]:
        """The maps of sample `i` by name, HWC; raises `PriorMismatch` if they are damaged or not of `sample`."""
        record = self.record(i, sample)
        stored = {name: record.maps[name].decode() for name in self._decoded}
        return {name: stored[name] if name in stored else self._derived[name].derive(stored) for name in self.names}

    def nearest(self, name: str) -> bool:
        """True if the map has labels, so that resampling must use the nearest value."""
        return self._kind_of[name].nearest

    def flip(self, name: str, map_HWC: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The map of the mirrored image."""
        return self._kind_of[name].flip(map_HWC)

    def record(self, i: int, sample: Sample) -> Record:
        """The stored maps of sample `i`; raises `PriorMismatch` if they are damaged or not of `sample`."""
        shard = bisect_right(self._start_of, i) - 1
        row = i - self._start_of[shard]
        try:
            index, file = self._indexes.get(shard, self._read_index), self._files.get(shard, self._open)
            record = Record.from_bytes(read_span(file, index.offsets[row], index.sizes[row]))
            if record.key != sample.key:
                raise ValueError(f"they belong to {record.key!r}")
            if not record.source:
                raise ValueError(f"they do not exist, because the sample could not be read ({record.bad})")
            if record.source != source_hash(sample):
                raise ValueError("they were computed from another image of that name")
            if {name: stored.fingerprint.hex() for name, stored in record.maps.items()} != self._fingerprints:
                raise ValueError("they were computed with other settings or another version")
        except (*NO_FILE, ValueError) as error:
            shard_url = storage.join(self.url, self.shards[shard].name)
            raise PriorMismatch(f"{shard_url}, maps of {sample.key!r}: {error}; {WAY_OUT}") from error
        return record

    def bad_keys(self) -> set[str]:
        """The keys of the samples without maps, or with maps that could not be computed."""
        shards = range(len(self.shards))
        return {key for k in shards for key, _ in self._indexes.get(k, self._read_index).bad}

    def _read_index(self, shard: int) -> PriorIndex:
        url = storage.join(self.url, index_name(self.shards[shard].name))
        try:
            index = PriorIndex.from_bytes(storage.read_bytes(url))
        except ValueError as error:
            raise ValueError(f"the index {url}: {error}") from error
        if index.shard != self.shards[shard]:
            raise ValueError(f"the index {url} belongs to another shard than {MANIFEST_NAME} lists")
        return index

    def _open(self, shard: int) -> int:
        info = self.shards[shard]
        return open_shard(storage.join(self.url, info.name), size_bytes=info.size_bytes, sha256_hex=info.sha256)


def set_url(dataset_url: str, name: str) -> str:
    """The folder of the prior set `name` of a data set."""
    return storage.join(dataset_url, "priors", name)


def _with_derived(priors: Iterable[Prior]) -> dict[str, Prior | Derived]:
    """The priors and the maps derived from them, by name."""
    stored = {prior.name: prior for prior in priors}
    return {**stored, **derivable(stored)}


def fingerprints(priors: Iterable[Prior]) -> dict[str, str]:
    """The fingerprint of each prior, by name."""
    return {prior.name: fingerprint(prior) for prior in priors}


def read_manifest(url: str) -> PriorManifest | None:
    """The manifest of the set at `url`; None if it is missing, damaged or of another version."""
    try:
        manifest = PriorManifest.model_validate(parse_checked(storage.read_bytes(storage.join(url, MANIFEST_NAME))))
    except (*NO_FILE, ValueError):
        return None
    return manifest if manifest.format_version == FORMAT_VERSION else None
