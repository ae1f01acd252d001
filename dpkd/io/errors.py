"""Errors of local and remote files as `StorageError`s with the place, the cause and the way out; retries.

A temporary failure (a busy, slow or unreachable store) is `StorageUnavailable`. A missing file is no failure: reading
it raises one of `NO_FILE`.
"""

import errno
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from dpkd.errors import StorageError, StorageUnavailable, UserError

Result = TypeVar("Result")

NO_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
"""Errors of reading a place without a file."""

WAITS_S = (0.2, 1.0, 5.0, 20.0)
"""Waits before retries of a failed storage operation."""

_NO_PERMISSION = "no permission to write there: choose another folder or change its permissions"
_WAY_OUT = {
    errno.ENOSPC: "the disk is full: free some space or choose another folder, then run the command again",
    errno.EDQUOT: "the disk quota is used up: free some space or choose another folder, then run the command again",
    errno.EFBIG: "the file would be larger than the system allows (ulimit -f): raise that limit",
    errno.EACCES: _NO_PERMISSION,
    errno.EPERM: _NO_PERMISSION,
    errno.EROFS: "that file system is read-only: choose another folder",
}
_MAY_PASS = {
    errno.EAGAIN, errno.EBUSY, errno.EHOSTUNREACH, errno.EIO, errno.ENETUNREACH, errno.EREMOTEIO, errno.ESTALE,
    errno.ETIMEDOUT,
}  # fmt: skip


def may_pass(error: Exception) -> bool:
    """Whether the same operation may succeed after a short time."""
    if isinstance(error, StorageUnavailable | ConnectionError | TimeoutError):
        return True
    return isinstance(error, OSError) and error.errno in _MAY_PASS


def retry(act: Callable[[], Result]) -> Result:
    """The result of `act`; tries again, with growing waits, after temporary failures of storage."""
    for wait_s in WAITS_S:
        try:
            return act()
        except OSError as error:
            if not may_pass(error):
                raise
            time.sleep(wait_s)
    return act()


@contextmanager
def write_errors(url: str | Path) -> Iterator[None]:
    """Turns an `OSError` of writing into a `StorageError` that names the place, the cause and the way out."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        way_out = _WAY_OUT.get(error.errno or 0, "check that the place exists and can be written, or choose another")
        raise _failure(error, f"cannot write {url}: {error.strerror or error}; {way_out}") from error


@contextmanager
def read_errors(url: str | Path) -> Iterator[None]:
    """Turns an `OSError` of reading, except those of `NO_FILE`, into a `StorageError` that names the place."""
    try:
        yield
    except (StorageError, *NO_FILE):
        raise
    except PermissionError as error:
        message = f"cannot read {url}: no permission; change its permissions or choose another place"
        raise StorageError(message) from error
    except OSError as error:
        way_out = "check the storage, or restore the file from a copy, then run the command again"
        raise _failure(error, f"cannot read {url}: {error.strerror or error}; {way_out}") from error


def _failure(error: Exception, message: str) -> StorageError:
    return StorageUnavailable(message) if may_pass(error) else StorageError(message)


@contextmanager
def remote_errors(url: str | Path) -> Iterator[None]:
    """Turns errors of the library of a remote store, except those of `NO_FILE`, into a `StorageError`.

    The libraries share no error class and are not all installed, so class names and error numbers are compared.
    """
    try:
        yield
    except (StorageError, UserError):
        raise
    except NO_FILE as error:
        response: dict[str, Any] = getattr(error.__cause__, "response", None) or {}
        if response.get("Error", {}).get("Code") == "NoSuchBucket":
            raise StorageError(f"{url}: there is no such bucket; create it, or correct the URL") from error
        raise
    except Exception as error:  # each file system of fsspec has other errors
        kind = type(error).__name__
        if type(error).__module__ == "builtins" and not isinstance(error, OSError):
            raise  # a bug of dpkd
        if isinstance(error, PermissionError) or re.search("Credential|Token|Profile|Unauthori", kind):
            raise StorageError(
                f"{url}: {kind}: {error}; give credentials that may read and write there, on every node: for s3:// "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            ) from error
        is_final = isinstance(error, OSError) and error.errno is not None and not may_pass(error)
        if is_final or "Validation" in kind:
            raise StorageError(f"{url}: {kind}: {error}; correct the URL or the settings of the store") from error
        raise StorageUnavailable(
            f"{url}: {kind}: {error}; all retries failed. Check that the store runs and can be reached from this "
            "machine (for s3:// AWS_ENDPOINT_URL sets another address than the provider's), then run the command "
            "again: it continues from there"
        ) from error
