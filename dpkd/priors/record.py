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
import operator
import zlib
from dataclasses import dataclass
from typing import Any

import cv2
import msgpack
import numpy as np

from dpkd.data.shards import Sample
from dpkd.priors.base import Extractor, fingerprint
from dpkd.priors.codecs import CODECS, MAX_VALUES, AbsentCodec, Codec, Map, Shape

FORMAT_VERSION = 2
MEMBER_EXTENSION = "priors.msgpack"


@dataclass(frozen=True)
class StoredMap:
    """One map as bytes, with what it takes to read it, and the fingerprint of the prior that made it."""

    codec: str
    shape: Shape
    scale: float
    fingerprint: str
    data: bytes

    def to_list(self) -> list[Any]:
        """What the member holds of it."""
        return [self.codec, self.shape, self.scale, bytes.fromhex(self.fingerprint), self.data]

    @staticmethod
    def from_list(content: list[Any]) -> "StoredMap":
        """Reads what `to_list` gives; raises ValueError or TypeError for anything else."""
        codec, shape, scale, mark, data = content
        height, width, channels = (operator.index(each) for each in shape)
        if min(height, width, channels) < 1 or height * width * channels > MAX_VALUES:
            raise ValueError(f"a map of {height} x {width} x {channels} values is none that dpkd makes")
        if not (isinstance(codec, str) and isinstance(mark, bytes) and isinstance(data, bytes)):
            raise TypeError("a map is a codec, a shape, a scale, a fingerprint and its bytes")
        return StoredMap(codec, (height, width, channels), float(scale), mark.hex(), data)

    def decode(self) -> Map:
        """The map, HWC; raises ValueError where the bytes are not of this codec and shape."""
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
        content = {
            "format_version": FORMAT_VERSION,
            "key": self.key,
            "source": self.source,
            "bad": self.bad,
            "maps": {name: stored.to_list() for name, stored in self.maps.items()},
        }
        return _pack({**content, "checksum": zlib.crc32(_pack(content))})

    @staticmethod
    def from_bytes(data: bytes) -> "Record":
        """Reads a member's content; raises ValueError where it is damaged or of another format."""
        try:
            content = msgpack.unpackb(data)
            checksum = content.pop("checksum")
            if zlib.crc32(_pack(content)) != checksum:
                raise ValueError("the checksum of the prior maps is wrong")
            if content["format_version"] != FORMAT_VERSION:
                raise ValueError(f"prior maps of format {content['format_version']}; this dpkd reads {FORMAT_VERSION}")
            maps = {str(name): StoredMap.from_list(stored) for name, stored in content["maps"].items()}
            return Record(key=content["key"], source=content["source"], maps=maps, bad=content["bad"])
        except (KeyError, TypeError, AttributeError, OverflowError, msgpack.UnpackException) as error:
            raise ValueError(f"the prior maps are damaged: {error!r}") from error


def source_hash(sample: Sample) -> bytes:
    """What binds maps to the bytes that they were made from: the image, and the masks and maps given with it."""
    digest = hashlib.sha256(sample.image)
    for name, data in sorted(sample.given.items()):
        digest.update(f"{name} {len(data)}".encode())
        digest.update(data)
    return digest.digest()[:16]


def store(prior: Extractor, map_HWC: Map) -> StoredMap:
    """The map of `prior` as bytes; raises ValueError for one of more than `MAX_VALUES` values."""
    height, width, channels = map_HWC.shape
    if map_HWC.size > MAX_VALUES:
        raise ValueError(
            f"the map {prior.name} of {height} x {width} x {channels} values is too large: raise its stride"
        )
    codec: Codec = AbsentCodec() if np.isnan(map_HWC[0, 0, 0]) else prior.codec
    return StoredMap(
        codec=codec.name,
        shape=(height, width, channels),
        scale=codec.scale,
        fingerprint=fingerprint(prior),
        data=codec.encode(map_HWC),
    )


def flat(prior: Extractor) -> StoredMap:
    """A map of a single cell, for a sample whose map cannot be computed: it favours no place over another."""
    if prior.nearest:
        return store(prior, np.zeros((1, 1, prior.channels), np.int32))
    return store(prior, np.full((1, 1, prior.channels), 0.5, np.float32))


def _pack(content: dict[str, Any]) -> bytes:
    packed = msgpack.packb(content)
    assert isinstance(packed, bytes)
    return packed
