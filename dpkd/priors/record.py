"""The member of a prior shard: all maps of one sample, bound to its image.

    <key>.priors.msgpack = {
        "format_version": 2,
        "key": the sample's key,
        "source": SHA-256 of the bytes of the image and of what an expert gave with it (the first 16); empty where
                  the sample could not be read, which has no maps,
        "bad": why the maps are flat or there are none; else none,
        "maps": {name: [codec, [H, W, C], scale, fingerprint of the prior (8 bytes), data]},
        "checksum": CRC-32 of this same msgpack without the checksum,
    }

`dpkd.priors.codecs` says what "data" is. webdataset 1.0 knows other endings of msgpack than this one: give its decoder
`webdataset.autodecode.Decoder([handle_extension("msgpack", msgpack.unpackb)])` to read the member without dpkd.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import cv2
import msgpack
import numpy as np

from dpkd.data.shards import Sample
from dpkd.io.record import pack_checked, unpack_checked
from dpkd.priors.base import Extractor, fingerprint
from dpkd.priors.codecs import ABSENT, CODECS, MAX_VALUES, Map, Shape

FORMAT_VERSION = 2
MEMBER_EXTENSION = "priors.msgpack"
DAMAGE = (KeyError, TypeError, AttributeError, OverflowError, ValueError, msgpack.UnpackException)
"""What reading damaged msgpack raises."""


@dataclass(frozen=True)
class StoredMap:
    """One map as bytes, with what it takes to read it, and the fingerprint of the prior that made it."""

    codec: str
    shape: Shape
    scale: float
    fingerprint: str
    data: bytes

    def to_list(self) -> list[Any]:
        """The entry of the member."""
        return [self.codec, self.shape, self.scale, bytes.fromhex(self.fingerprint), self.data]

    def decode(self) -> Map:
        """The map, HWC; raises ValueError where the bytes are not of this codec and shape."""
        height, width, channels = self.shape
        if min(self.shape) < 1 or height * width * channels > MAX_VALUES:
            raise ValueError(f"a map of {height} x {width} x {channels} values is none that dpkd makes")
        if self.codec not in CODECS:
            raise ValueError(f"the codec {self.codec!r} is not one of {', '.join(CODECS)}")
        try:
            return CODECS[self.codec].decode(self.data, self.shape)
        except cv2.error as error:
            raise ValueError(f"not {self.codec} data: {error}") from error


@dataclass(frozen=True)
class Record:
    """All maps of one sample."""

    key: str
    source: bytes
    """`source_hash` of the sample that the maps belong to."""
    maps: dict[str, StoredMap]
    bad: str | None = None
    """Why the maps could not be computed and favour no place, or why the sample could not be read."""

    @staticmethod
    def unreadable(key: str, *, reason: str) -> "Record":
        """The record of a sample that cannot be read: bound to no image, so it is served with none."""
        return Record(key=key, source=b"", maps={}, bad=reason)

    @property
    def readable(self) -> bool:
        """Whether the sample could be read when its maps were made."""
        return self.source != b""

    def to_bytes(self) -> bytes:
        """The member's content."""
        maps = {name: stored.to_list() for name, stored in self.maps.items()}
        content = {"key": self.key, "source": self.source, "bad": self.bad, "maps": maps}
        return pack_checked({"format_version": FORMAT_VERSION, **content})

    @staticmethod
    def from_bytes(data: bytes) -> "Record":
        """Reads a member's content; raises ValueError where it is damaged or of another format."""
        try:
            content = unpack_checked(data)
            version = content.pop("format_version")
            if version != FORMAT_VERSION:
                raise ValueError(f"format {version}; this dpkd reads {FORMAT_VERSION}")
            maps = {
                name: StoredMap(codec, shape, scale, mark.hex(), stored)
                for name, (codec, shape, scale, mark, stored) in content["maps"].items()
            }
            return Record(**{**content, "maps": maps})
        except DAMAGE as error:
            raise ValueError(f"the prior maps are damaged: {error!r}") from error


def source_hash(sample: Sample) -> bytes:
    """The hash that binds maps to the bytes they were made from: the image, and the masks and maps given with it."""
    digest = hashlib.sha256(sample.image)
    for name, data in sorted(sample.given.items()):
        digest.update(f"{name} {len(data)}".encode())
        digest.update(data)
    return digest.digest()[:16]


def store_map(prior: Extractor, map_HWC: Map) -> StoredMap:
    """The map of `prior` as bytes; raises ValueError for one of more than `MAX_VALUES` values."""
    height, width, channels = map_HWC.shape
    if map_HWC.size > MAX_VALUES:
        raise ValueError(
            f"the map {prior.name} of {height} x {width} x {channels} values is too large: raise its stride"
        )
    codec = ABSENT if np.isnan(map_HWC[0, 0, 0]) else prior.codec
    return StoredMap(
        codec=codec.name,
        shape=(height, width, channels),
        scale=codec.scale,
        fingerprint=fingerprint(prior),
        data=codec.encode(map_HWC),
    )


def flat_map(prior: Extractor) -> StoredMap:
    """A map of a single cell, for a sample whose map cannot be computed: it favours no place over another."""
    if prior.nearest:
        return store_map(prior, np.zeros((1, 1, prior.channels), np.int32))
    return store_map(prior, np.full((1, 1, prior.channels), 0.5, np.float32))
