"""Shards open for reading: local shards in place, remote shards as verified copies on this disk, up to a limit.

<temporary folder>/dpkd-shards-<user>/<sha256>.tar     every process that has the copy open holds a shared lock on it

The kernel releases the locks of every dead process, so a copy that can be locked exclusively is not in use.
"""

import fcntl
import os
import secrets
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Generic, TypeVar

from dpkd.errors import UserError
from dpkd.io import storage
from dpkd.io.errors import read_errors, write_errors
from dpkd.io.temporary_folder import lasting_folder

Value = TypeVar("Value")

MAX_FILES = 64
"""Most shards that one reader keeps open."""
MAX_INDEXES = 256
"""Most shard indexes that one reader keeps in memory: about 40 MB at 1,024 samples per shard."""


class ChecksumDiffers(UserError):
    """The checksum of a remote shard is not the expected one."""


def open_shard(url: str | Path, *, size_bytes: int, sha256_hex: str) -> int:
    """A file descriptor for reading the shard; the caller closes it.

    Copies of remote shards take at most half of the disk space that is free without them. The copies unused for longest
    are removed first, but never an open one. Raises one of `NO_FILE` for a missing shard, `ChecksumDiffers` for a wrong
    checksum, `StorageError` for a shard that cannot be read.
    """
    path = storage.local_path(url)
    if path is not None:
        with read_errors(path):
            if path.is_dir():  # `os.open` opens folders too
                raise IsADirectoryError(path)
            return os.open(path, os.O_RDONLY)
    copy = Path(tempfile.gettempdir()) / f"dpkd-shards-{os.getuid()}" / f"{sha256_hex}.tar"
    with suppress(FileNotFoundError):
        descriptor = os.open(copy, os.O_RDONLY)
        if os.fstat(descriptor).st_size == size_bytes:
            fcntl.flock(descriptor, fcntl.LOCK_SH)  # prevents removal
            os.utime(descriptor)  # many systems do not keep access times
            return descriptor
        os.close(descriptor)
    with write_errors(copy):
        copy.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _make_room(copy.parent, needed_bytes=size_bytes)
    with lasting_folder("shard", secrets.token_hex(8)) as folder:
        file = folder / copy.name
        storage.copy_here(url, file)
        if storage.sha256(file) != sha256_hex:
            raise ChecksumDiffers(
                f"{url} is not the file that dataset.json describes (its checksum differs): pack or copy it again"
            )
        descriptor = os.open(file, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        storage.deliver(file, copy)
    return descriptor


def _make_room(folder: Path, *, needed_bytes: int) -> None:
    """Removes the copies unused for longest until the new one fits; other processes may do the same."""
    state_of = {}
    for path in folder.glob("*.tar"):
        with suppress(FileNotFoundError):
            state_of[path] = path.stat()
    used_bytes = sum(state.st_size for state in state_of.values())
    limit_bytes = (shutil.disk_usage(folder).free + used_bytes) // 2
    for path, state in sorted(state_of.items(), key=lambda item: item[1].st_mtime_ns):
        if used_bytes + needed_bytes <= limit_bytes:
            return
        with suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            used_bytes -= state.st_size


class LRUCache(Generic[Value]):
    """At most `limit` values by number; `on_evict` gets the least recently used ones, and at the end all others."""

    def __init__(self, limit: int, *, on_evict: Callable[[Value], object] = id) -> None:
        self._limit = limit
        self._on_evict = on_evict
        self._values: OrderedDict[int, Value] = OrderedDict()

    def get(self, number: int, make: Callable[[int], Value]) -> Value:
        """The cached value of `number`, or a new one from `make`."""
        if number not in self._values:
            while len(self._values) >= self._limit:  # before `make`, which must not exceed the limit
                self._on_evict(self._values.popitem(last=False)[1])
            self._values[number] = make(number)
        self._values.move_to_end(number)
        return self._values[number]

    def __del__(self) -> None:
        for value in self._values.values():
            self._on_evict(value)
