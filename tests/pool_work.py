"""What workers do in the tests of pools; apart from the tests, so that a worker imports little."""

import os
import signal
import time
from pathlib import Path

from dpkd.errors import UserError


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


def note_and_wait(item):
    number, folder = item
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(0 if number == 0 else 60)
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
