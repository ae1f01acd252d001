"""A temporary folder that is kept during its use and removed afterwards.

The process that created it holds a lock on it: system cleaners of old temporary files keep locked folders. The next
folder of the same kind removes the folders of killed processes.
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

    The token must be random, so that the name is unique.
    """
    folder = place(kind, token)
    for old in folder.parent.glob(place(kind, "*").name):
        with suppress(OSError):  # it belongs to another user, is gone, or is locked by a running process
            handle = os.open(old, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(old)
            finally:
                os.close(handle)
    with write_errors(folder):
        part = tempfile.mkdtemp(prefix=".dpkd-", dir=folder.parent)
        handle = os.open(part, os.O_RDONLY)
        with suppress(OSError):  # without locks in the file system, no folder is removed either
            fcntl.flock(handle, fcntl.LOCK_SH)
        Path(part).rename(folder)  # after the lock: other processes remove unlocked folders of this name
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def place(kind: str, token: str) -> Path:
    """The path of the folder; it has the host's name, because machines may share a temporary folder without locks."""
    return Path(tempfile.gettempdir()) / f"dpkd-{kind}-{socket.gethostname()}-{token}"
