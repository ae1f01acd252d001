"""A prior set on disk: maps are bound to their image by hash, and never served to another image.

<dataset>/priors/<set>/
  priors.json                   `PriorManifest`; written last, so a folder without it is not a whole set
  <split>-000000.tar            one member a sample, <key>.priors.msgpack (`dpkd.priors.record`), in the order of the
                                image shard of that name
  <split>-000000.index.msgpack  `PriorIndex`: written after its tar, which it vouches for

Manifest and index have a checksum of their own each.
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

from dpkd.data.shards import Dataset, Sample, ShardInfo, index_name, read_span
from dpkd.errors import UserError
from dpkd.io import storage
from dpkd.io.errors import NO_FILE
from dpkd.io.record import pack_checked, parse_checked, unpack_checked
from dpkd.io.shard_cache import MAX_FILES, MAX_INDEXES, LRUCache, open_shard
from dpkd.priors import Prior
from dpkd.priors.base import fingerprint, mirror
from dpkd.priors.codecs import Map
from dpkd.priors.derived import derivable
from dpkd.priors.record import Record, source_hash

FORMAT_VERSION = 3
MANIFEST_NAME = "priors.json"
WAY_OUT = "run the prepare stage again (dpkd prepare)"


class PriorMismatch(UserError):
    """Maps that are damaged, or belong to another image or another prior: they are not served."""


class PriorManifest(BaseModel):
    """The content of priors.json."""

    model_config = ConfigDict(frozen=True)
    format_version: int = FORMAT_VERSION
    dataset: str
    """Fingerprint of the data set whose images the maps were made from."""
    priors: tuple[Prior, ...]
    fingerprints: dict[str, str]
    """name -> fingerprint of the prior, code version included."""
    splits: dict[str, tuple[ShardInfo, ...]]
    unreadable: dict[str, tuple[int, ...]]
    """split -> numbers of the samples that could not be read, ascending: they are left out of all that follows."""
    num_flat: int = 0
    """Samples that can be read, and whose maps are flat because they could not be computed."""


@dataclass(frozen=True)
class PriorIndex:
    """The index beside a prior shard."""

    shard: ShardInfo
    images: str
    """SHA-256 of the image shard."""
    fingerprints: dict[str, str]
    """name -> fingerprint of the prior whose map every sample has, in the order of the settings."""
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    bad: tuple[tuple[str, str], ...] = ()
    """(key, reason) of samples whose maps are flat, or that could not be read."""
    unreadable: tuple[int, ...] = ()
    """Which samples of the shard could not be read, from 0."""
    fault: str | None = None
    """What is wrong with the file of the image shard, if anything; samples that are proved sound have their maps."""

    def to_bytes(self) -> bytes:
        """The file's content."""
        return pack_checked({"format_version": FORMAT_VERSION, **vars(self), "shard": self.shard.model_dump()})

    @staticmethod
    def from_bytes(data: bytes) -> "PriorIndex":
        """Reads the file's content; raises ValueError where it is not one."""
        content = unpack_checked(data)
        if content.pop("format_version", None) != FORMAT_VERSION:
            raise ValueError("it is of another format version")
        known = {field.name: content[field.name] for field in fields(PriorIndex)}
        return PriorIndex(**{**known, "shard": ShardInfo(**content["shard"])})


@dataclass(frozen=True)
class PriorSet:
    """A whole prior set, open for reading."""

    url: str
    manifest: PriorManifest

    @staticmethod
    def open(dataset_url: str, name: str) -> "PriorSet":
        """Opens the set `name` of a data set; raises `UserError` where it is not whole, or made for other images."""
        url = set_url(dataset_url, name)
        manifest = read_manifest(url)
        if manifest is None:
            raise UserError(f"no whole prior set at {url}: {MANIFEST_NAME} is missing or cannot be read; {WAY_OUT}")
        if manifest.dataset != Dataset.open(dataset_url).manifest.fingerprint:
            raise UserError(f"the prior set at {url} was prepared from other images than {dataset_url}; {WAY_OUT}")
        if manifest.fingerprints != fingerprints(manifest.priors):
            raise UserError(f"the prior set at {url} was prepared by another version of dpkd; {WAY_OUT}")
        return PriorSet(url=url, manifest=manifest)

    @property
    def channels(self) -> dict[str, int]:
        """Channels of each map by name, derived maps among them."""
        stored = {prior.name: prior.channels for prior in self.manifest.priors}
        return stored | dict.fromkeys(derivable(stored), 1)

    def split(self, name: str) -> "PriorSplit":
        """The maps of the split `name`; raises `UserError` that names the splits there are."""
        if name not in self.manifest.splits:
            known = ", ".join(self.manifest.splits)
            raise UserError(f"the prior set at {self.url} has no split {name!r}; it has: {known}")
        priors = self.manifest.priors
        return PriorSplit(self.url, priors, self.manifest.splits[name], tuple(prior.name for prior in priors))

    def unreadable(self, split: str) -> npt.NDArray[np.int64]:
        """Numbers of the samples of a split that could not be read when their maps were to be made, ascending."""
        return np.array(self.manifest.unreadable[split], np.int64)


@dataclass(eq=False)
class PriorSplit:
    """The maps of one split by sample number. Pickles small: files are opened again where they are used."""

    url: str
    priors: tuple[Prior, ...]
    shards: tuple[ShardInfo, ...]
    names: tuple[str, ...]
    """The maps that are served."""

    def __post_init__(self) -> None:
        self._prior_of: dict[str, Prior] = {prior.name: prior for prior in self.priors}
        self._fingerprints = fingerprints(self.priors)
        self._derived = derivable(self._prior_of)
        needed = {need for name in self.names if name in self._derived for need in self._derived[name].needs}
        self._decoded = {*self.names, *needed} - {*self._derived}
        self._start_of = list(accumulate((shard.num_samples for shard in self.shards), initial=0))
        self._files: LRUCache[int] = LRUCache(MAX_FILES, on_evict=os.close)
        self._indexes: LRUCache[PriorIndex] = LRUCache(MAX_INDEXES)

    def __reduce__(self) -> tuple[Any, ...]:
        return PriorSplit, (self.url, self.priors, self.shards, self.names)

    def only(self, names: Iterable[str]) -> "PriorSplit":
        """The same split serving these maps alone, derived ones among them; the others are not even decoded.

        Raises `UserError` that names the maps there are for one that is not among them.
        """
        known = [*self._prior_of, *self._derived]
        wanted = tuple(dict.fromkeys(names))
        for name in wanted:
            if name not in known:
                raise UserError(f"the prior set at {self.url} has no map {name!r}; it has: {', '.join(known)}")
        return PriorSplit(self.url, self.priors, self.shards, wanted)

    @property
    def digests(self) -> dict[str, str]:
        """The fingerprint of each prior whose map is read, by its name."""
        return {name: digest for name, digest in self._fingerprints.items() if name in self._decoded}

    def read(self, i: int, sample: Sample) -> dict[str, Map]:
        """The maps of sample `i` by name, HWC; raises `PriorMismatch` unless they are whole and `sample`'s own."""
        record = self.record(i, sample)
        stored = {name: record.maps[name].decode() for name in self._decoded}
        return {name: stored[name] if name in stored else self._derived[name].derive(stored) for name in self.names}

    def nearest(self, name: str) -> bool:
        """Whether the map holds labels, so that resampling must take the nearest one."""
        return name in self._prior_of and self._prior_of[name].nearest

    def flip(self, name: str, map_HWC: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The map of the mirrored image."""
        return self._prior_of[name].flip(map_HWC) if name in self._prior_of else mirror(map_HWC)

    def record(self, i: int, sample: Sample) -> Record:
        """The maps of sample `i` as they are stored; raises `PriorMismatch` unless they are `sample`'s own."""
        shard = bisect_right(self._start_of, i) - 1
        row = i - self._start_of[shard]
        try:
            index, file = self._indexes.get(shard, self._read_index), self._files.get(shard, self._open)
            record = Record.from_bytes(read_span(file, index.offsets[row], index.sizes[row]))
            if record.key != sample.key:
                raise ValueError(f"they belong to {record.key!r}")
            if not record.source:
                raise ValueError(f"there are none, because the sample could not be read ({record.bad})")
            if record.source != source_hash(sample):
                raise ValueError("they were made from another image of that name")
            if {name: stored.fingerprint.hex() for name, stored in record.maps.items()} != self._fingerprints:
                raise ValueError("they were made with other settings or another version")
        except (*NO_FILE, ValueError) as error:
            place = storage.join(self.url, self.shards[shard].name)
            raise PriorMismatch(f"{place}, maps of {sample.key!r}: {error}; {WAY_OUT}") from error
        return record

    def _read_index(self, shard: int) -> PriorIndex:
        index = PriorIndex.from_bytes(storage.read_bytes(storage.join(self.url, index_name(self.shards[shard].name))))
        if index.shard != self.shards[shard]:
            raise ValueError(f"their index is not of the shard that {MANIFEST_NAME} lists")
        return index

    def _open(self, shard: int) -> int:
        info = self.shards[shard]
        return open_shard(storage.join(self.url, info.name), size_bytes=info.size_bytes, sha256_hex=info.sha256)


def set_url(dataset_url: str, name: str) -> str:
    """The folder of the prior set `name` of a data set."""
    return storage.join(dataset_url, "priors", name)


def fingerprints(priors: Iterable[Prior]) -> dict[str, str]:
    """The fingerprint of each prior, by its name."""
    return {prior.name: fingerprint(prior) for prior in priors}


def read_manifest(url: str) -> PriorManifest | None:
    """The manifest of the set at `url`; None without one that this version reads."""
    try:
        manifest = PriorManifest.model_validate(parse_checked(storage.read_bytes(storage.join(url, MANIFEST_NAME))))
    except (*NO_FILE, ValueError):
        return None
    return manifest if manifest.format_version == FORMAT_VERSION else None
