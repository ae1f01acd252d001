"""Local or object storage through fsspec: atomic writes, ranges, checksums.

A location is a path or any fsspec URL (`s3://…`, `gs://…`, `memory://…`). Local writes go to a hidden file beside the
target, are flushed to the disk and renamed; object stores publish a whole object or none. A write that fails raises
`UserError` with the path and the cause; a read of what is not there raises `FileNotFoundError`.
"""

import errno
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec

from dpkd.errors import UserError

TEMPORARY_PREFIX = ".tmp-"

_WAY_OUT = {
    errno.ENOSPC: "the disk is full: free some space or choose another folder, then run the command again",
    errno.EDQUOT: "the disk quota is used up: free some space or choose another folder, then run the command again",
    errno.EFBIG: "the file would be larger than the system allows (ulimit -f): raise that limit",
    errno.EACCES: "no permission to write there: choose another folder or change its permissions",
    errno.EPERM: "no permission to write there: choose another folder or change its permissions",
    errno.EROFS: "that file system is read-only: choose another folder",
}


def local_path(url: str | Path) -> Path | None:
    """The path of a local location, or None for a remote one."""
    text = str(url)
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    return None if "://" in text else Path(text)


def join(url: str | Path, *parts: str) -> str:
    """The location of `parts` below `url`."""
    path = local_path(url)
    if path is not None:
        return str(path.joinpath(*parts))
    return "/".join([str(url).rstrip("/"), *parts])


def exists(url: str | Path) -> bool:
    """True where a file or folder stands."""
    path = local_path(url)
    if path is not None:
        with _read_errors(url):
            return path.exists()
    filesystem, name = _remote(url)
    return bool(filesystem.exists(name))


def is_file(path: str | Path) -> bool:
    """True for a local file or a link to one; False, and never an error, for anything else and any name."""
    return os.path.isfile(path)  # noqa: PTH113 (Path.is_file raises for long names and locked folders)


def size(url: str | Path) -> int:
    """Bytes of a file."""
    path = local_path(url)
    if path is not None:
        return path.stat().st_size
    filesystem, name = _remote(url)
    return int(filesystem.size(name))


def list_names(url: str | Path) -> list[str]:
    """Sorted names of what stands directly in a folder, hidden names included; empty where there is no folder."""
    path = local_path(url)
    if path is not None:
        with _read_errors(url):
            return sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    filesystem, name = _remote(url)
    if not filesystem.isdir(name):
        return []
    return sorted(str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in filesystem.ls(name, detail=False))


def walk(url: str | Path) -> list[tuple[str, int]]:
    """(relative path with slashes, bytes) of every file below a folder, sorted; hidden names are left out.

    What is neither file nor folder (a pipe, a device, a link to nowhere) has -1 bytes.
    """
    path = local_path(url)
    with _read_errors(url):
        return sorted(_walk_local(path, "", set()) if path is not None else _walk_remote(url))


def read_bytes(url: str | Path) -> bytes:
    """The whole content of a file."""
    path = local_path(url)
    if path is not None:
        return path.read_bytes()
    filesystem, name = _remote(url)
    return cast(bytes, filesystem.cat_file(name))


def read_range(url: str | Path, offset: int, size: int) -> bytes:
    """`size` bytes from `offset`; fewer where the file ends before."""
    path = local_path(url)
    if path is not None:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(size)
    filesystem, name = _remote(url)
    return cast(bytes, filesystem.cat_file(name, start=offset, end=offset + size))


@contextmanager
def open_read(url: str | Path) -> Iterator[BinaryIO]:
    """A seekable binary file, closed at the end."""
    path = local_path(url)
    if path is not None:
        with path.open("rb") as file:
            yield file
        return
    filesystem, name = _remote(url)
    with filesystem.open(name, "rb") as file:
        yield cast(BinaryIO, file)


@contextmanager
def open_atomic(url: str | Path) -> Iterator[BinaryIO]:
    """A new binary file that appears at `url`, whole and flushed to the disk, once the block ends without an error."""
    path = local_path(url)
    folder = path.parent if path is not None else Path(tempfile.gettempdir())
    beside = folder / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}-{str(url).rsplit('/', 1)[-1]}"
    try:
        with write_errors(url):
            folder.mkdir(parents=True, exist_ok=True)
            with beside.open("xb") as file:
                yield file
                file.flush()
                if path is not None:
                    os.fsync(file.fileno())
            if path is not None:
                beside.replace(path)
                sync_folder(folder)
            else:
                filesystem, name = _remote(url)
                filesystem.makedirs(name.rsplit("/", 1)[0], exist_ok=True)
                filesystem.put_file(str(beside), name)
    finally:
        with suppress(OSError):  # the first error is the one to tell
            beside.unlink(missing_ok=True)


def write_bytes_atomic(url: str | Path, data: bytes) -> None:
    """Writes a file so that it is seen whole or not at all."""
    with open_atomic(url) as file:
        file.write(data)


def remove(url: str | Path) -> None:
    """Deletes one file; nothing happens where there is none."""
    path = local_path(url)
    if path is not None:
        path.unlink(missing_ok=True)
        return
    filesystem, name = _remote(url)
    if filesystem.exists(name):
        filesystem.rm_file(name)


def publish(folder_tmp: str | Path, folder: str | Path) -> None:
    """Flushes every file of a local folder to the disk and renames it to where it counts, which must be free."""
    source, target = Path(folder_tmp), Path(folder)
    with write_errors(target):
        for parent, _, names in os.walk(source):
            for name in names:
                sync_file(Path(parent) / name)
            sync_folder(Path(parent))
        if target.exists():
            raise UserError(f"{target} stands already and is never overwritten: remove it or choose another folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        source.rename(target)
        sync_folder(target.parent)


def fetch(url: str | Path, *, size_bytes: int, sha256_hex: str) -> Path:
    """A local file with the content of `url`: itself where local, else a checked copy kept in the temporary folder."""
    path = local_path(url)
    if path is not None:
        return path
    folder = Path(tempfile.gettempdir()) / f"dpkd-shards-{os.getuid()}" / sha256_hex[:2]
    copy = folder / f"{sha256_hex}.tar"
    if copy.exists() and copy.stat().st_size == size_bytes:
        return copy
    with open_atomic(copy) as target, open_read(url) as source:
        shutil.copyfileobj(source, target, 1 << 20)
    if sha256(copy) != sha256_hex:
        copy.unlink(missing_ok=True)
        raise UserError(
            f"{url} is not the file that dataset.json describes (its checksum differs): pack or copy it again"
        )
    return copy


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open_read(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def digest(data: bytes) -> str:
    """Hexadecimal SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def sync_file(path: Path) -> None:
    """Flushes a file's content to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Flushes a folder's list of names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def write_errors(url: str | Path) -> Iterator[None]:
    """Turns an `OSError` of writing into a `UserError` that names the place, the cause and the way out."""
    try:
        yield
    except OSError as error:
        way_out = _WAY_OUT.get(error.errno or 0, "check that the place exists and can be written, or choose another")
        raise UserError(f"cannot write {url}: {error.strerror or error}; {way_out}") from error


@contextmanager
def _read_errors(url: str | Path) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise UserError(f"cannot read {url}: no permission; change its permissions or choose another place") from error


def _remote(url: str | Path) -> tuple[Any, str]:
    filesystem, name = fsspec.core.url_to_fs(str(url))
    return filesystem, str(name)


def _walk_local(folder: Path, prefix: str, seen: set[str]) -> Iterator[tuple[str, int]]:
    real = os.path.realpath(folder)
    if real in seen:  # a link back to a folder above
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if os.path.isdir(entry.path):  # noqa: PTH112 (Path.is_dir raises for a link to itself)
                yield from _walk_local(Path(entry.path), f"{prefix}{entry.name}/", seen | {real})
            else:
                yield f"{prefix}{entry.name}", entry.stat().st_size if is_file(entry.path) else -1


def _walk_remote(url: str | Path) -> Iterator[tuple[str, int]]:
    filesystem, name = _remote(url)
    root = name.rstrip("/") + "/"
    for path, info in filesystem.find(name, detail=True).items():
        relative = str(path).removeprefix(root)
        if not any(part.startswith(".") for part in relative.split("/")):
            yield relative, int(info["size"])
