"""The member of a prior shard: all maps of one sample, bound to the image by a hash.

    <key>.priors.msgpack = {
        "format_version": 2,
        "key": the sample's key,
        "source": SHA-256 of the bytes of the image and the expert's maps (the first 16); empty for an unreadable
                  sample, which has no maps,
        "bad": the reason for flat or missing maps; else none,
        "maps": {name: [codec, [H, W, C], scale, fingerprint of the prior (8 bytes), data]},
        "checksum": CRC-32 of this same msgpack without the checksum,
    }

`dpkd.priors.codecs` defines "data". webdataset 1.0 uses other extensions of msgpack: give it the decoder
`webdataset.autodecode.Decoder([handle_extension("msgpack", msgpack.unpackb)])` to read the member without dpkd.
"""

import hashlib
from dataclasses import dataclass, field
from typing import NamedTuple

import cv2
import numpy as np

from dpkd.data.sample import Sample
from dpkd.io.record import pack_checked, unpack_checked
from dpkd.priors.base import PriorConfig, fingerprint
from dpkd.priors.codecs import ABSENT, CODECS, MAX_VALUES, Map, Shape

FORMAT_VERSION = 2
MEMBER_EXTENSION = "priors.msgpack"


class StoredMap(NamedTuple):
    """One map as bytes, with the data for decoding: an entry of the member."""

    codec: str
    shape: Shape
    scale: float
    fingerprint: bytes
    """Fingerprint of the map's prior."""
    data: bytes

    def decode(self) -> Map:
        """The map, HWC; raises ValueError if the bytes do not match codec and shape."""
        height, width, channels = self.shape
        if min(self.shape) < 1 or height * width * channels > MAX_VALUES:
            raise ValueError(f"a map of {height} x {width} x {channels} values is outside the limits of dpkd")
        if self.codec == ABSENT:
            return np.full(self.shape, np.nan, np.float32)
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
    """`source_hash` of the maps' sample; empty if the sample could not be read."""
    bad: str | None = None
    """The reason for flat maps that could not be computed, or for an unreadable sample."""
    maps: dict[str, StoredMap] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The member's content."""
        return pack_checked({"format_version": FORMAT_VERSION, **vars(self)})

    @staticmethod
    def from_bytes(data: bytes) -> "Record":
        """Reads a member's content; raises ValueError if it is damaged or has another format."""
        content = unpack_checked(data)
        version = content.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise ValueError(f"the format is {version}, and this dpkd reads {FORMAT_VERSION}")
        return Record(**{**content, "maps": {name: StoredMap(*stored) for name, stored in content["maps"].items()}})


def source_hash(sample: Sample) -> bytes:
    """The hash that binds maps to their source bytes: the image, and the expert's masks and maps."""
    digest = hashlib.sha256(sample.image)
    for name, data in sorted(sample.given.items()):
        digest.update(f"{name} {len(data)}".encode())
        digest.update(data)
    return digest.digest()[:16]


def store_map(prior: PriorConfig, map_HWC: Map) -> StoredMap:
    """The map of `prior` as bytes; raises ValueError if it has more than `MAX_VALUES` values."""
    height, width, channels = map_HWC.shape
    if map_HWC.size > MAX_VALUES:
        raise ValueError(
            f"the map {prior.name} of {height} x {width} x {channels} values is too large: increase its stride"
        )
    shape, digest = (height, width, channels), bytes.fromhex(fingerprint(prior))
    if np.isnan(map_HWC[0, 0, 0]):
        return StoredMap(ABSENT, shape, 1.0, digest, b"")
    return StoredMap(prior.codec.name, shape, prior.codec.scale, digest, prior.codec.encode(map_HWC))


def flat_map(prior: PriorConfig) -> StoredMap:
    """A constant map of one cell, for a sample whose map cannot be computed."""
    value = np.int32(0) if prior.nearest else np.float32(prior.unknown)
    return store_map(prior, np.full((1, 1, prior.channels), value))
