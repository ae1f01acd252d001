"""Packed data sets with something wrong in them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from dpkd.data.shards import MANIFEST_NAME, Dataset, Split, checksum, index_name
from dpkd.io import storage

Change = Callable[[bytes], bytes]


def zeros(data: bytes) -> bytes:
    """As many zeros."""
    return bytes(len(data))


def flip_header(data: bytes) -> bytes:
    """The bytes of a JPEG with one bit of its second marker the other way, so that nothing decodes it."""
    return data[:3] + bytes([data[3] ^ 0x80]) + data[4:]


def change_member(split: Split, i: int, extension: str, change: Change) -> str:
    """Changes the bytes of a member of sample `i` in its shard, and nothing else; returns the sample's key."""
    shard, row = split.locate(i)
    index = split.index(shard)
    offset, size = (int(column[row]) for column in index.members[extension])
    with (Path(split.url) / split.info.shards[shard].name).open("r+b") as file:
        file.seek(offset)
        data = file.read(size)
        file.seek(offset)
        changed = change(data)
        assert len(changed) == size
        file.write(changed)
    return index.keys[row]


def cut_inside(split: Split, i: int) -> list[str]:
    """Cuts the shard of sample `i` within its image; returns the keys that are no longer whole."""
    shard, row = split.locate(i)
    index = split.index(shard)
    extension = next(ext for ext in ("jpg", "png") if ext in index.members)
    offset, size = (int(column[row]) for column in index.members[extension])
    place = Path(split.url) / split.info.shards[shard].name
    place.write_bytes(place.read_bytes()[: offset + size // 2])
    return list(index.keys[row:])


def vouch(dataset: Dataset) -> Dataset:
    """Makes indexes and dataset.json say that the shards were packed as they now are."""
    splits = {}
    for name, info in dataset.manifest.splits.items():
        shards = []
        for index in dataset.split(name).indexes():
            data = (Path(dataset.url) / index.shard.name).read_bytes()
            shard = index.shard.model_copy(update={"sha256": storage.digest(data)})
            spans = {
                ext: np.stack([offset_N, offset_N + size_N], 1) for ext, (offset_N, size_N) in index.members.items()
            }
            checksums = [
                checksum({ext: data[slice(*each[row])] for ext, each in spans.items() if each[row, 0] >= 0})
                for row in range(len(index.keys))
            ]
            path = Path(dataset.url) / index_name(index.shard.name)
            path.write_bytes(replace(index, shard=shard, checksum_N=np.array(checksums, np.uint32)).to_bytes())
            shards.append(shard)
        splits[name] = info.model_copy(update={"shards": tuple(shards)})
    manifest = dataset.manifest.model_copy(update={"splits": splits})
    (Path(dataset.url) / MANIFEST_NAME).write_bytes(manifest.to_bytes())
    return Dataset.open(dataset.url)
