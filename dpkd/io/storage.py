"""Local or object storage: atomic writes, ranges, checksums.

A location is a path or any fsspec URL (`s3://…`, `gs://…`, `memory://…`). Local writes go to a hidden file beside the
target, are flushed to the disk and renamed; object stores publish a whole object or none. A failed operation raises
`StorageError` with the place and the cause; a read of a missing file raises one of `NO_FILE`. The library of the store
(for S3 botocore and s3fs) retries single requests with growing pauses; the pool retries whole items.
"""

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from dpkd.errors import StorageUnavailable, UserError
from dpkd.io.errors import NO_FILE, read_errors, remote_errors, write_errors
from dpkd.io.temporary_folder import lasting_folder

TEMPORARY_PREFIX = ".tmp-"
BLOCK_BYTES = 1 << 20


def local_path(url: str | Path) -> Path | None:
    """The path of a local location; None for a remote one."""
    text = str(url)
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    return None if "://" in text else Path(text)


def join(url: str | Path, *parts: str) -> str:
    """The location of `parts` below `url`."""
    path = local_path(url)
    return "/".join([str(url).rstrip("/"), *parts]) if path is None else str(path.joinpath(*parts))


def exists(url: str | Path) -> bool:
    """Whether a file or folder exists at the location."""
    path = local_path(url)
    if path is not None:
        with read_errors(url):
            return path.exists()
    with _remote(url) as (filesystem, name), suppress(FileNotFoundError):
        filesystem.info(name)  # its `exists` returns False for any failure
        return True
    return False


def is_file(path: str | Path) -> bool:
    """Whether the path is a local file or a link to one; never raises, for any name."""
    return os.path.isfile(path)  # noqa: PTH113 (Path.is_file raises for long names and locked folders)


def size(url: str | Path) -> int:
    """The size of a file in bytes."""
    path = local_path(url)
    if path is not None:
        return path.stat().st_size
    with _remote(url) as (filesystem, name):
        return int(filesystem.size(name))


def list_names(url: str | Path) -> list[str]:
    """Sorted names directly in a folder, hidden ones included; empty if the folder does not exist."""
    path = local_path(url)
    if path is not None:
        with read_errors(url):
            return sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    with _remote(url) as (filesystem, name):
        try:
            entries = [str(entry).rstrip("/") for entry in filesystem.ls(name, detail=False)]
        except (FileNotFoundError, NotADirectoryError):
            return []
        folder = name.rstrip("/")  # listed for a file, and for an empty object that marks a folder
        return sorted(entry.rsplit("/", 1)[-1] for entry in entries if entry.strip("/") != folder.strip("/"))


def walk(url: str | Path) -> list[tuple[str, int]]:
    """(relative path with slashes, bytes) of every file below a folder, sorted, without hidden names.

    Follows linked folders. An entry that is neither file nor folder (a pipe, a device, a broken link) has -1 bytes. An
    empty local folder is one entry, with a slash at its end.
    """
    path = local_path(url)
    with read_errors(url):
        if path is not None:
            return sorted(_walk_local(path, "", set()))
        with _remote(url) as (filesystem, name):
            files = filesystem.find(name, detail=True)
    root = name.rstrip("/") + "/"
    named = {str(file).removeprefix(root): int(info["size"]) for file, info in files.items()}
    return sorted(item for item in named.items() if not any(part.startswith(".") for part in item[0].split("/")))


def _walk_local(folder: Path, prefix: str, seen: set[str]) -> Iterator[tuple[str, int]]:
    real = os.path.realpath(folder)
    if real in seen:  # a link back to a folder above
        return
    with os.scandir(folder) as entries:
        shown = [entry for entry in entries if not entry.name.startswith(".")]
        if prefix and not shown:
            yield prefix, 0
        for entry in shown:
            if os.path.isdir(entry.path):  # noqa: PTH112 (Path.is_dir raises for a link to itself)
                yield from _walk_local(Path(entry.path), f"{prefix}{entry.name}/", seen | {real})
            else:
                yield f"{prefix}{entry.name}", entry.stat().st_size if is_file(entry.path) else -1


def glob(pattern: str) -> list[str]:
    """Sorted locations that match a pattern with `*`, `?` or `[…]`, local or remote."""
    with _remote(pattern) as (filesystem, name):
        matches = [str(filesystem.unstrip_protocol(match)) for match in filesystem.glob(name)]
    return sorted(match.removeprefix("file://") for match in matches)


def read_range(url: str | Path, offset: int = 0, size: int = -1) -> bytes:
    """`size` bytes from `offset`, fewer at the end of the file, all for -1. Local errors are not converted."""
    path = local_path(url)
    if path is not None:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(size)
    with _remote(url) as (filesystem, name):
        span = {"start": offset, "end": offset + size} if size >= 0 else {}  # an empty object has no range
        return cast(bytes, filesystem.cat_file(name, **span))


def read_bytes(url: str | Path) -> bytes:
    """The whole content of a file; raises one of `NO_FILE` if it is missing, `StorageError` if it is unreadable."""
    with read_errors(url):
        return read_range(url)


@contextmanager
def open_read(url: str | Path) -> Iterator[BinaryIO]:
    """Yields a seekable binary file, and closes it after the body."""
    path = local_path(url)
    if path is not None:
        with path.open("rb") as file:
            yield file
        return
    with _remote(url) as (filesystem, name):
        file = filesystem.open(name, "rb")
    with file:
        yield cast(BinaryIO, _RemoteFile(file, url))


@contextmanager
def open_atomic(url: str | Path) -> Iterator[BinaryIO]:
    """Yields a new binary file, which appears at `url`, whole and flushed to the disk, if the body raises no error."""
    path = local_path(url)
    token = secrets.token_hex(8)
    with write_errors(url), lasting_folder("writing", token) if path is None else nullcontext(path.parent) as folder:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{TEMPORARY_PREFIX}{token}-{str(url).rpartition('/')[2]}"
        try:
            with temporary.open("xb") as file:
                yield file
            deliver(temporary, url)
        finally:
            with suppress(OSError):  # raise the first error
                temporary.unlink(missing_ok=True)


def write_bytes_atomic(url: str | Path, data: bytes) -> None:
    """Writes a file that readers see whole or not at all."""
    with open_atomic(url) as file:
        file.write(data)


def create(url: str | Path) -> bool:
    """Creates an empty file unless one exists; returns True for exactly one of several simultaneous writers."""
    path = local_path(url)
    with write_errors(url):
        if path is None:
            with _remote(url) as (filesystem, name), suppress(FileExistsError):
                filesystem.pipe_file(name, b"", mode="create")
                return True
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                path.open("xb").close()
                sync(path.parent)
                return True
    return False


def deliver(file: Path, url: str | Path) -> None:
    """Flushes a local file to the disk and moves it to `url`: a rename on the same disk, or an upload."""
    path = local_path(url)
    with write_errors(url):
        if path is None:
            with _remote(url) as (filesystem, name):
                filesystem.put_file(str(file), name)  # no makedirs: on S3 it would create a misspelt bucket
            file.unlink()
            return
        sync(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        file.replace(path)
        sync(path.parent)


def copy_here(url: str | Path, file: Path) -> None:
    """Copies a file to a local one; raises the errors of `read_bytes`."""
    with read_errors(url), open_read(url) as source, write_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as target:
            shutil.copyfileobj(source, target, BLOCK_BYTES)


def remove(url: str | Path) -> None:
    """Deletes one file if it exists."""
    path = local_path(url)
    with write_errors(url):
        if path is not None:
            path.unlink(missing_ok=True)
            return
        with _remote(url) as (filesystem, name), suppress(FileNotFoundError):
            filesystem.rm_file(name)


def remove_tree(url: str | Path) -> None:
    """Deletes a folder and all below it, or a file, if it exists."""
    path = local_path(url)
    with write_errors(url):
        if path is None:
            with _remote(url) as (filesystem, name), suppress(FileNotFoundError):
                filesystem.rm(name, recursive=True)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def publish(folder_tmp: str | Path, folder: str | Path) -> None:
    """Flushes every file of a local folder to the disk and renames the folder to `folder`, which must not exist."""
    source, target = Path(folder_tmp), Path(folder)
    with write_errors(target):
        for parent, _, names in os.walk(source):
            for path in (*(Path(parent, name) for name in names), Path(parent)):
                sync(path)
        if target.exists():
            raise UserError(f"{target} exists already and is never overwritten: remove it or choose another folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        source.rename(target)
        sync(target.parent)


def sha256(url: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's content; raises the errors of `read_bytes`."""
    digest = hashlib.sha256()
    with read_errors(url), open_read(url) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def digest(data: bytes) -> str:
    """Hexadecimal SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def sync(path: Path) -> None:
    """Flushes a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _RemoteFile:
    """A remote file open for reading; it raises the same errors as the other operations."""

    def __init__(self, file: Any, url: str | Path) -> None:
        self._file, self._url = file, url
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        try:
            with remote_errors(self._url):
                return cast(bytes, self._file.read(size))
        except NO_FILE as error:
            raise StorageUnavailable(f"{self._url} was removed during reading") from error


@contextmanager
def _remote(url: str | Path) -> Iterator[tuple[Any, str]]:
    """Yields the file system and the name in it; converts errors of the body by `remote_errors`."""
    import fsspec  # noqa: PLC0415  not at the top: it loads asyncio, and most runs use a disk

    try:
        # cached listings would hide files of other processes
        filesystem, name = fsspec.core.url_to_fs(str(url), use_listings_cache=False)
    except (ImportError, ValueError) as error:
        protocol = str(url).partition("://")[0]
        install = 'pip install "dpkd[s3]"' if protocol in {"s3", "s3a"} else "install its fsspec package"
        raise UserError(
            f"{url}: {protocol}:// cannot be opened ({error}); {install} on every node, or use a path"
        ) from error
    with remote_errors(url):
        yield filesystem, str(name)
