"""A temporary folder that exists for as long as it is needed, and no longer.

The process that made it holds a lock on it: what tidies up old temporary folders respects that, and the next one of its
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

from dpkd.io.errors import write_errors


@contextmanager
def lasting_folder(kind: str, token: str) -> Iterator[Path]:
    """A new folder `dpkd-<kind>-<host>-<token>` for the body in the system's temporary folder.

    The token is random: nobody else has a folder of that name.
    """
    folder = place(kind, token)
    for old in folder.parent.glob(place(kind, "*").name):
        with suppress(OSError):  # another user's, gone, or locked by a process that lives
            handle = os.open(old, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(old)
            finally:
                os.close(handle)
    with write_errors(folder):
        part = tempfile.mkdtemp(prefix=".dpkd-", dir=folder.parent)
        handle = os.open(part, os.O_RDONLY)
        with suppress(OSError):  # a file system without locks, where nothing is removed either
            fcntl.flock(handle, fcntl.LOCK_SH)
        Path(part).rename(folder)  # locked before it has the name by which others take it for dead
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def place(kind: str, token: str) -> Path:
    """Where the folder of that name is; other machines may share the temporary folder, and not its locks."""
    return Path(tempfile.gettempdir()) / f"dpkd-{kind}-{socket.gethostname()}-{token}"
