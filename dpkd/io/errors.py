"""What goes wrong with files, local and remote, as `StorageError`s with the place, the cause and the way out; a retry.

A failure that may pass (a busy, slow or unreachable store) is `StorageUnavailable`. A missing file is no failure:
reading it raises one of `NO_FILE`.
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
"""What reading a place without a file raises."""

WAITS_S = (0.2, 1.0, 5.0, 20.0)
"""Waits before an operation that storage failed is tried again."""

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
    """Whether the same operation may succeed a little later."""
    if isinstance(error, StorageUnavailable | ConnectionError | TimeoutError):
        return True
    return isinstance(error, OSError) and error.errno in _MAY_PASS


def retry(act: Callable[[], Result]) -> Result:
    """The result of `act`, which is tried again after a while where storage fails in a way that may pass."""
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
        way_out = "see to the storage, or restore it from a copy, then run the command again"
        raise _failure(error, f"cannot read {url}: {error.strerror or error}; {way_out}") from error


def _failure(error: Exception, message: str) -> StorageError:
    return StorageUnavailable(message) if may_pass(error) else StorageError(message)


@contextmanager
def remote_errors(url: str | Path) -> Iterator[None]:
    """Turns whatever the library of a remote store raises, except those of `NO_FILE`, into a `StorageError`.

    The libraries share no class of errors and are not all installed, so names and numbers must do.
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
    except Exception as error:  # each file system of fsspec has its own
        kind = type(error).__name__
        if type(error).__module__ == "builtins" and not isinstance(error, OSError):
            raise  # a mistake of ours
        if isinstance(error, PermissionError) or re.search("Credential|Token|Profile|Unauthori", kind):
            raise StorageError(
                f"{url}: {kind}: {error}; give credentials that may read and write there, on every node: for s3:// "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            ) from error
        is_final = isinstance(error, OSError) and error.errno is not None and not may_pass(error)
        if is_final or "Validation" in kind:
            raise StorageError(f"{url}: {kind}: {error}; correct the URL or the settings of the store") from error
        raise StorageUnavailable(
            f"{url}: {kind}: {error}; it was tried again several times: see that the store runs and can be reached "
            "from here (for s3:// AWS_ENDPOINT_URL is another address than the provider's own), then run the command "
            "again, which goes on from there"
        ) from error
