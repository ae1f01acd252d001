"""What a source holds, before it is packed: where the bytes of each sample are and what is known of it."""

import difflib
import errno
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dpkd.data.image_headers import BrokenImage
from dpkd.data.sources.text import key_of
from dpkd.io import storage
from dpkd.io.errors import NO_FILE, read_errors

MAX_FILE_BYTES = 1 << 31
"""Larger image files are not read: no image that is small enough to be decoded takes that much."""
_BAD_NAMES = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)
_SYSTEM_FOLDERS = frozenset(
    {
        "@eadir", "@tmp", "@recycle", "#recycle", "#snapshot", "@__thumb", "__macosx", "$recycle.bin", "lost+found",
        "system volume information", "__pycache__",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Blob:
    """A file, or a range of one, read when it is needed; size -1 means the whole file, of unknown size."""

    url: str
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        """The bytes; raises `BrokenImage` where they are missing, locked or too few, `StorageError` for a bad disk."""
        refuse_no_file(self.url)
        if self.size > MAX_FILE_BYTES:
            raise BrokenImage(f"it has {self.size:,} bytes, more than {MAX_FILE_BYTES:,}")
        try:
            data = storage.read_range(self.url, self.offset, self.size if self.offset else -1)
        except ValueError as error:  # a name that no file can have
            raise BrokenImage(f"the file cannot be read: {error}") from error
        except OSError as error:
            if isinstance(error, (*NO_FILE, PermissionError)) or error.errno in _BAD_NAMES:
                raise BrokenImage(f"the file cannot be read: {error.strerror or error}") from error
            with read_errors(self.url):
                raise
        if self.size >= 0 and len(data) != self.size:
            raise BrokenImage(f"{len(data)} of {self.size} bytes are there")
        return data


@dataclass(frozen=True, slots=True)
class Record:
    """One sample of a source."""

    name: str
    """Path of the image in the source: it orders the samples, names them in reports and gives the key."""
    image: Blob
    class_name: str | None = None
    split: str | None = None
    """The split that the source itself names."""
    group: str | None = None
    given: dict[str, Blob] = field(default_factory=dict)
    """Maps of an expert by the ending of their member: `mask.png`, `expert-<name>.png`."""
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SourceContents:
    """All that a source holds."""

    records: tuple[Record, ...]
    bad: tuple[tuple[str, str], ...] = ()
    """(item, reason) of what cannot be used."""
    classes: tuple[str, ...] | None = None
    """The classes in the source's own order, where it has one."""
    shuffled: bool = False
    """True where the source's order is one to keep, because it streams."""
    layout: str = ""
    """How the source was understood."""
    passed_over: Mapping[str, int] = field(default_factory=dict)
    """Suffix, or folder of a system, -> number of files that are no part of any sample."""


def refuse_no_file(url: str) -> None:
    """Raises `BrokenImage` for a place that is no file: reading a pipe might never end."""
    path = storage.local_path(url)
    if path is not None and os.path.lexists(path) and not storage.is_file(path):
        raise BrokenImage("it is no file, but a folder, a pipe, a device or a link to nowhere")


def sorted_classes(names: Iterable[str | None]) -> tuple[str, ...]:
    """The distinct names in order: numbers by value, anything else by letters."""
    distinct = {name for name in names if name is not None}
    are_numbers = all(name.isdecimal() for name in distinct)
    return tuple(sorted(distinct, key=lambda name: (int(name) if are_numbers else 0, name)))


def keys_of(names: Sequence[str]) -> list[str]:
    """A WebDataset key for each distinct name, as `key_of` makes it; a hash tells two equal ones apart."""
    keys = [key_of(name) for name in names]
    counts = Counter(keys)
    return [
        key if counts[key] == 1 else f"{key}~{storage.digest(name.encode('utf-8', 'surrogateescape'))[:8]}"
        for key, name in zip(keys, names, strict=True)
    ]


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or nothing where no known name is near."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def passed_over_as(name: str) -> str:
    """How a file that is no part of a sample is counted: `in @eaDir` for folders of systems, else its suffix."""
    if folder := system_folder(name):
        return f"in {folder}"
    stem, dot, suffix = name.rpartition("/")[2].rpartition(".")
    return f".{suffix.lower()}" if dot and stem else "without a suffix"


def describe_counts(counts: Mapping[str, int], *, limit: int = 12) -> str:
    """`6 .gif, 2 .txt`, the most first."""
    ordered = sorted(counts, key=lambda name: (-counts[name], name))
    shown = ", ".join(f"{counts[name]:,} {name}" for name in ordered[:limit])
    return shown + (f" and {len(ordered) - limit} more kinds" if len(ordered) > limit else "")


def system_folder(name: str) -> str | None:
    """The folder on the way to a file that an operating system or a NAS made for itself, or None."""
    return next((part for part in name.split("/")[:-1] if part.lower() in _SYSTEM_FOLDERS), None)
