"""The index beside a shard: where the members of each sample stand, and what is known of it (`shards` draws the files).

Axes: N samples.
"""

import zlib
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from dpkd.errors import UserError
from dpkd.io import storage
from dpkd.io.errors import NO_FILE

FORMAT_VERSION = 1
IMAGE_EXTENSIONS = ("jpg", "png", "webp")


class ShardInfo(BaseModel):
    """One shard of a split."""

    model_config = ConfigDict(frozen=True)
    name: str = Field(pattern=r"^\w[\w.-]*\.tar$")
    """A file of the data set's own folder: no path."""
    num_samples: int = Field(ge=0)
    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


@dataclass(frozen=True)
class ShardIndex:
    """The index beside a shard, in columns; an offset of -1 means that the sample has no such member."""

    keys: tuple[str, ...]
    label_N: npt.NDArray[np.int64]
    groups: tuple[str | None, ...]
    members: dict[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]
    """extension -> (offset of each sample's data, size of it)."""
    shard: ShardInfo
    plan: str = ""
    """Digest of what the shard was to be made from."""
    bad: tuple[tuple[str, str], ...] = ()
    """(item, reason) of what could not be packed."""
    pixel_counts: tuple[tuple[int, ...], ...] = ()
    """For R, G and B: how often each of the 256 values occurs."""
    checksum_N: npt.NDArray[np.uint32] | None = None
    """`checksum` of each sample; None in the index of an earlier dpkd."""

    def to_bytes(self) -> bytes:
        """The file's content."""
        columns = {ext: [offset.tolist(), size.tolist()] for ext, (offset, size) in sorted(self.members.items())}
        content = {
            "format_version": FORMAT_VERSION,
            "shard": self.shard.model_dump(),
            "plan": self.plan,
            "keys": self.keys,
            "labels": self.label_N.tolist(),
            "groups": self.groups,
            "members": columns,
            "bad": self.bad,
            "pixel_counts": self.pixel_counts,
            "checksums": None if self.checksum_N is None else self.checksum_N.tolist(),
        }
        return pack_checked(content)

    @staticmethod
    def from_bytes(data: bytes) -> "ShardIndex":
        """Reads the file's content; raises `ValueError` where it is not one."""
        try:
            content = unpack_checked(data)
            members = {
                str(ext): (np.array(offset, dtype=np.int64), np.array(size, dtype=np.int64))
                for ext, (offset, size) in content["members"].items()
            }
            index = ShardIndex(
                keys=content["keys"],
                label_N=np.array(content["labels"], dtype=np.int64),
                groups=content["groups"],
                members=members,
                shard=ShardInfo(**content["shard"]),
                plan=content["plan"],
                bad=content["bad"],
                pixel_counts=content["pixel_counts"],
                checksum_N=None if content.get("checksums") is None else np.array(content["checksums"], np.uint32),
            )
            _refuse_contradictions(index)
            return index
        except (KeyError, TypeError, AttributeError, OverflowError, msgpack.UnpackException, ValueError) as error:
            raise ValueError(f"not a shard index: {error!r}") from error


def pack_checked(content: dict[str, Any]) -> bytes:
    """The content of an index as msgpack, with a CRC-32 of all of it as its last entry, `checksum`."""
    return _pack({**content, "checksum": zlib.crc32(_pack(content))})


def unpack_checked(data: bytes) -> dict[str, Any]:
    """What `pack_checked` was given, lists as tuples; raises ValueError or an error of msgpack where it is damaged.

    The index of an earlier dpkd has no checksum, and is read as it is.
    """
    content = msgpack.unpackb(data, use_list=False, unicode_errors="surrogatepass")
    if not isinstance(content, dict):
        raise ValueError("it is no map")  # noqa: TRY004 (a fault of the file)
    found = content.pop("checksum", None)
    if found is not None and found != zlib.crc32(_pack(content)):
        raise ValueError("its checksum is wrong: it was changed since it was written")
    return content


def _pack(content: dict[str, Any]) -> bytes:
    packed = msgpack.packb(content, unicode_errors="surrogatepass")  # file names are any bytes
    assert isinstance(packed, bytes)
    return packed


def index_name(shard_name: str) -> str:
    """The file name of a shard's index."""
    return shard_name.removesuffix(".tar") + ".index.msgpack"


def read_index(url: str, shard: ShardInfo) -> ShardIndex:
    """The index of a shard of the data set at `url`; raises `UserError` where it is missing or another shard's."""
    place = storage.join(url, index_name(shard.name))
    try:
        data = storage.read_bytes(place)
    except NO_FILE as error:
        raise UserError(f"{place} is missing; dataset.json lists its shard: pack or copy it again") from error
    try:
        index = ShardIndex.from_bytes(data)
    except ValueError as error:
        raise UserError(f"{place} cannot be read: {error}; pack or copy it again") from error
    if index.shard != shard:
        raise UserError(f"{place} does not belong to the {shard.name} that dataset.json lists: pack the data set again")
    return index


def refuse_outside(offset_N: npt.ArrayLike, size_N: npt.ArrayLike, shard: ShardInfo) -> None:
    """Raises ValueError unless there are a place and a size for each sample, all inside the shard."""
    offset_N, size_N = np.asarray(offset_N, np.int64), np.asarray(size_N, np.int64)
    if offset_N.shape != (shard.num_samples,) or size_N.shape != (shard.num_samples,):
        raise ValueError("a column has another number of entries than the shard has samples")
    if ((offset_N < 0) | (size_N < 0) | (size_N > shard.size_bytes - offset_N)).any():
        raise ValueError("a sample stands outside the shard")


def refuse_no_pairs(bad: Any) -> None:
    """Raises TypeError unless these are pairs of an item and a reason."""
    if not all(isinstance(item, str) and isinstance(reason, str) for item, reason in bad):
        raise TypeError("an item or a reason is no text")


def _refuse_contradictions(index: ShardIndex) -> None:
    """Raises ValueError unless each sample has a key, a label, one image and its json, all inside the shard."""
    count = index.shard.num_samples
    if not len(index.keys) == len(index.groups) == len(index.label_N) == count or index.label_N.ndim != 1:
        raise ValueError("a column has another number of entries than the shard has samples")
    if not all(isinstance(key, str) for key in index.keys):
        raise TypeError("a key is no text")
    if not all(group is None or isinstance(group, str) for group in index.groups):
        raise TypeError("a group is no text")
    refuse_no_pairs(index.bad)
    if np.shape(index.pixel_counts) not in ((0,), (3, 256)):
        raise ValueError("the counts of pixels are not those of three colours")
    there = {extension: offset_N != -1 for extension, (offset_N, _) in index.members.items()}
    for extension, (offset_N, size_N) in index.members.items():
        refuse_outside(np.where(there[extension], offset_N, 0), np.where(there[extension], size_N, 0), index.shard)
    num_images = sum((there[extension].astype(int) for extension in IMAGE_EXTENSIONS if extension in there), start=0)
    if count and not (np.all(num_images == 1) and there["json"].all()):
        raise ValueError("a sample has not just one image and its json")
