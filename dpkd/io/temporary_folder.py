"""A temporary folder that stands for as long as it is needed, and no longer.

The process that made it holds a lock on it: what tidies up old temporary folders heeds that, and the next one of its
kind removes what a process that was killed left behind.
"""

import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def lasting_folder(kind: str, token: str) -> Iterator[Path]:
    """A new folder `dpkd-<kind>-<host>-<token>` for the body in the system's temporary folder.

    Raises `FileExistsError` where it stands already.
    """
    _remove_dead(kind)
    folder = place(kind, token)
    handle = _made(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def place(kind: str, token: str) -> Path:
    """Where the folder of that name stands; other machines may share the temporary folder, and not its locks."""
    return Path(tempfile.gettempdir()) / f"dpkd-{kind}-{socket.gethostname()}-{token}"


def _made(folder: Path) -> int:
    """Makes the folder; returns what holds the lock on it."""
    while True:
        folder.mkdir(mode=0o700)
        with suppress(FileNotFoundError):  # taken for dead before it was locked
            handle = os.open(folder, os.O_RDONLY)
            with suppress(OSError):  # a file system without locks, where nothing is removed either
                fcntl.flock(handle, fcntl.LOCK_SH)
            with suppress(FileNotFoundError):
                if _is(handle, folder):
                    return handle
            os.close(handle)


def _remove_dead(kind: str) -> None:
    for folder in place(kind, "").parent.glob(place(kind, "*").name):
        with suppress(OSError):  # another user's, or gone
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is(handle, folder):
                    shutil.rmtree(folder)
            finally:
                os.close(handle)


def _is(handle: int, folder: Path) -> bool:
    """Whether the folder is still the one that was opened; raises `FileNotFoundError` where it is gone."""
    return os.path.samestat(os.fstat(handle), folder.stat())
