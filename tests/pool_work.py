"""What workers do in the tests of pools; apart from the tests, so that a worker imports little."""

import errno
import os
import signal
import time
import uuid
from pathlib import Path

from dpkd.errors import StorageUnavailable, UserError


def square(number):
    return number * number


def refuse_three(number):
    if number == 3:
        raise UserError("data.source: three is not allowed")
    return number


def kill_first_worker(item):
    number, folder = item
    mark = Path(folder) / str(number)
    if number == 3 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def kill_worker(number):
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def hang_first_worker(item):
    """The first worker of the item 3 never answers."""
    number, folder, how = item
    mark = Path(folder) / str(number)
    if number == 3 and not mark.exists():
        mark.touch()
        if how == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(600)
    return number


def name_process(_item):
    return os.getpid()


def answer_at_length(item):
    """Says which process it is, before it answers with more than a pipe holds; the item 0 waits for that."""
    number, folder = item
    if number == 0:
        while not list(Path(folder).iterdir()):
            time.sleep(0.02)
        return b""
    (Path(folder) / str(os.getpid())).touch()
    return bytes(50_000_000)


def fail_at_first(item):
    """Fails as storage does, `num_failures` times for each item."""
    number, folder, num_failures = item
    marks = Path(folder) / str(number)
    marks.mkdir(exist_ok=True)
    attempt = len(list(marks.iterdir()))
    (marks / str(attempt)).touch()
    if number == 3 and attempt < num_failures:
        raise (StorageUnavailable("s3://bucket: busy") if attempt % 2 else OSError(errno.ESTALE, "stale file handle"))
    return number


def refuse_file(item):
    number, folder = item
    (Path(folder) / f"{number}-{uuid.uuid4().hex}").touch()
    raise FileNotFoundError(f"no file {number}")


def num_threads(_item):
    import numpy as np  # noqa: F401, PLC0415  as a function's module brings it in
    import threadpoolctl  # noqa: PLC0415

    return [each["num_threads"] for each in threadpoolctl.threadpool_info()]


def note_and_wait(item):
    number, folder = item
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(0 if number == 0 else 600)
    return number


def return_function(number):
    return lambda: number


def name_folder(_item):
    return str(Path.cwd())


def name_device(item):
    """The device of this worker, written down beside its process; the first worker of a device dies of the item 1."""
    number, folder = item
    device = os.environ["DEVICE"]
    mark = Path(folder) / f"{device}-{os.getpid()}"
    mark.touch()
    if number == 1 and len(list(Path(folder).glob(f"{device}-*"))) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.2)
    return device
