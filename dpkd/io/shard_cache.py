"""Shards open for reading: local ones as they stand, remote ones as checked copies on the disk, within a bound.

<temporary folder>/dpkd-shards-<user>/
  <sha256>.tar        a whole copy; every process that has it open holds a shared lock on it
  .tmp-<random>       a copy on its way, of its final size; its process holds an exclusive lock on it
  lock                held while copies are removed and begun

The kernel drops the locks of a process that dies, however it dies. So a copy that can be locked is in nobody's use, and
a file on its way that can be locked was left by a process that is gone.
"""

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dpkd.errors import UserError
from dpkd.io import storage
from dpkd.io.errors import read_errors

BLOCK_BYTES = 1 << 20


class ChecksumDiffers(UserError):
    """A remote shard that is not the one it should be."""


def open_shard(url: str | Path, *, size_bytes: int, sha256_hex: str) -> int:
    """A file descriptor for reading the shard, the caller's to close.

    Copies of remote shards may take half of the disk that is free without them; then those not opened for the longest
    time go, except what a process has open. Raises one of `NO_FILE` where there is no such shard, `ChecksumDiffers`
    where it is another than the checksum says, `UserError` where it cannot be read.
    """
    path = storage.local_path(url)
    if path is not None:
        with read_errors(path):
            if path.is_dir():  # which would open
                raise IsADirectoryError(path)
            return os.open(path, os.O_RDONLY)
    copy = Path(tempfile.gettempdir()) / f"dpkd-shards-{os.getuid()}" / f"{sha256_hex}.tar"
    with suppress(FileNotFoundError):
        descriptor = os.open(copy, os.O_RDONLY)
        if os.fstat(descriptor).st_size == size_bytes:
            fcntl.flock(descriptor, fcntl.LOCK_SH)  # against removal
            os.utime(descriptor)  # not the access time, which many systems do not keep
            return descriptor
        os.close(descriptor)
    return _fetch(url, copy, size_bytes=size_bytes, sha256_hex=sha256_hex)


def _make_room(folder: Path, *, needed_bytes: int) -> None:
    """Removes what dead processes left, then the copies not opened for longest, until the file fits the bound."""
    for path, _ in _files(folder, f"{storage.TEMPORARY_PREFIX}*"):
        _remove_unused(path)
    used_bytes = sum(stat.st_size for _, stat in _files(folder, "*"))
    limit_bytes = (shutil.disk_usage(folder).free + used_bytes) // 2
    for path, stat in sorted(_files(folder, "*.tar"), key=lambda file: file[1].st_mtime_ns):
        if used_bytes + needed_bytes <= limit_bytes:
            return
        if _remove_unused(path):
            used_bytes -= stat.st_size


def _files(folder: Path, pattern: str) -> list[tuple[Path, os.stat_result]]:
    """The files of that name and their state; other processes may remove some meanwhile."""
    files = []
    for path in folder.glob(pattern):
        with suppress(FileNotFoundError):
            files.append((path, path.stat()))
    return files


def _remove_unused(path: Path) -> bool:
    """Removes the file unless a process holds its lock; whether it did."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _fetch(url: str | Path, copy: Path, *, size_bytes: int, sha256_hex: str) -> int:
    """Copies the shard, which counts once its checksum is right; returns the copy, open and locked."""
    digest = hashlib.sha256()
    with storage.open_read(url) as source, storage.write_errors(copy), _begin(copy, size_bytes=size_bytes) as beside:
        with beside.open("r+b") as target:
            while block := source.read(BLOCK_BYTES):
                digest.update(block)
                target.write(block)
            os.fsync(target.fileno())
        if digest.hexdigest() != sha256_hex:
            raise ChecksumDiffers(
                f"{url} is not the file that dataset.json describes (its checksum differs): pack or copy it again"
            )
        descriptor = os.open(beside, os.O_RDONLY)
        beside.replace(copy)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor


@contextmanager
def _begin(copy: Path, *, size_bytes: int) -> Iterator[Path]:
    """A new locked file of that size beside the copy, for which there is room; gone after the block unless renamed."""
    copy.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (copy.parent / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _make_room(copy.parent, needed_bytes=size_bytes)
        descriptor, name = tempfile.mkstemp(dir=copy.parent, prefix=storage.TEMPORARY_PREFIX)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        os.ftruncate(descriptor, size_bytes)
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)
        os.close(descriptor)  # with the lock
