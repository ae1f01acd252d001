"""The samples of a source before packing: the location of the bytes, and the labels."""

import errno
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dpkd.data.image_headers import BrokenImage
from dpkd.data.settings import Source
from dpkd.data.shards import MASK_EXTENSION
from dpkd.data.text import key_of
from dpkd.io import storage
from dpkd.io.errors import NO_FILE, read_errors

MAX_FILE_BYTES = 1 << 31
"""Larger image files are not read: an image that can be decoded is smaller."""
_BAD_NAMES = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)
_SYSTEM_FOLDERS = frozenset(
    {
        "@eadir", "@tmp", "@recycle", "#recycle", "#snapshot", "@__thumb", "__macosx", "$recycle.bin", "lost+found",
        "system volume information", "__pycache__",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Blob:
    """A file or a byte range of it, read on demand; size -1 means the whole file, of unknown size."""

    url: str
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        """The bytes; raises `BrokenImage` if they are missing, locked or too few, `StorageError` for a bad disk."""
        refuse_no_file(self.url)
        if self.size > MAX_FILE_BYTES:
            raise BrokenImage(f"it has {self.size:,} bytes, more than {MAX_FILE_BYTES:,}")
        try:
            data = storage.read_range(self.url, self.offset, self.size if self.offset else -1)
        except ValueError as error:  # an impossible file name
            raise BrokenImage(f"the file cannot be read: {error}") from error
        except OSError as error:
            if isinstance(error, (*NO_FILE, PermissionError)) or error.errno in _BAD_NAMES:
                raise BrokenImage(f"the file cannot be read: {error.strerror or error}") from error
            with read_errors(self.url):
                raise
        if self.size >= 0 and len(data) != self.size:
            raise BrokenImage(f"only {len(data)} of {self.size} bytes can be read")
        return data


@dataclass(frozen=True, slots=True)
class Record:
    """One sample of a source."""

    name: str
    """Path of the image in the source: sorts the samples, names them in reports and determines the key."""
    image: Blob
    class_name: str | None = None
    labels: Mapping[str, int] | None = None
    """If it may have several: 1 if it has the label, -1 if that is unknown, else 0; None if all are unknown."""
    split: str | None = None
    """The split in the source."""
    group: str | None = None
    given: dict[str, Blob] = field(default_factory=dict)
    """The expert's maps by extension: `mask.png`, `expert-<name>.png`."""
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def labelled(self) -> bool:
        """True if its class, or one of its labels, is known."""
        return self.class_name is not None or self.labels is not None

    @property
    def label_names(self) -> list[str]:
        """Its class, or the labels that it has."""
        several = [name for name, value in (self.labels or {}).items() if value == 1]
        return several if self.class_name is None else [self.class_name]


@dataclass(frozen=True)
class SourceContents:
    """The content of a source."""

    records: tuple[Record, ...]
    bad: tuple[tuple[str, str], ...] = ()
    """(item, reason) of items that cannot be used."""
    classes: tuple[str, ...] | None = None
    """The classes in the source's order, if the source defines one."""
    shuffled: bool = False
    """True if the source's order must stay, because it streams."""
    layout: str = ""
    """A description of the detected layout."""
    ignored: Mapping[str, int] = field(default_factory=dict)
    """Suffix or system folder -> number of files that belong to no sample."""


def describe_source(source: Source, records: Sequence[Record]) -> str:
    """Kind, number and a digest of the samples with all that decides their bytes; not where the source is."""
    described = []
    for r in sorted(records, key=lambda record: record.name):
        mask = r.given.get(MASK_EXTENSION)
        num_maps = len(r.given) - (mask is not None)
        label = r.class_name if r.labels is None else dict(r.labels)
        described.append([r.name, r.image.size, label, r.split, r.group, mask and mask.size, num_maps, r.attributes])
    digest = storage.digest(json.dumps(described, default=str).encode())
    return f"{source.kind}, {len(records)} samples, {digest[:16]}"


def refuse_no_file(url: str) -> None:
    """Raises `BrokenImage` for a path that is not a file: reading a pipe might never end."""
    path = storage.local_path(url)
    if path is not None and os.path.lexists(path) and not storage.is_file(path):
        raise BrokenImage("it is not a file, but a folder, a pipe, a device or a broken link")


def sorted_classes(names: Iterable[str | None]) -> tuple[str, ...]:
    """The distinct names, sorted: by value if all are numbers, else alphabetically."""
    distinct = {name for name in names if name is not None}
    are_numbers = all(name.isdecimal() for name in distinct)
    return tuple(sorted(distinct, key=lambda name: (int(name) if are_numbers else 0, name)))


def keys_of(names: Sequence[str]) -> list[str]:
    """A WebDataset key for each distinct name by `key_of`; a hash distinguishes equal keys."""
    keys = [key_of(name) for name in names]
    counts = Counter(keys)
    return [
        key if counts[key] == 1 else f"{key}~{storage.digest(name.encode('utf-8', 'surrogateescape'))[:8]}"
        for key, name in zip(keys, names, strict=True)
    ]


def ignored_as(name: str) -> str:
    """The count's name for a file of no sample: `in @eaDir` for a system folder, else the suffix."""
    if folder := system_folder(name):
        return f"in {folder}"
    stem, dot, suffix = name.rpartition("/")[2].rpartition(".")
    return f".{suffix.lower()}" if dot and stem else "without a suffix"


def describe_counts(counts: Mapping[str, int], *, limit: int = 12) -> str:
    """`6 .gif, 2 .txt`, largest count first."""
    ordered = sorted(counts, key=lambda name: (-counts[name], name))
    shown = ", ".join(f"{counts[name]:,} {name}" for name in ordered[:limit])
    return shown + (f" and {len(ordered) - limit} more kinds" if len(ordered) > limit else "")


def system_folder(name: str) -> str | None:
    """The folder of an operating system or a NAS in the path, or None."""
    return next((part for part in name.split("/")[:-1] if part.lower() in _SYSTEM_FOLDERS), None)
