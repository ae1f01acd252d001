"""The life of a worker of a local gang, and what it leaves in the folder of its generation for the driver.

1.up        it has come so far as to be watched
1.pickle    the `Failure` with which it ended
1.done      it has done its work
1.log       what a worker other than the first printed
"""

import io
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch

from dpkd.engine import world
from dpkd.errors import StopRequested, StorageError, UserError
from dpkd.launch.forking import end_server, end_with_parent
from dpkd.launch.signals import STOP_SIGNALS
from dpkd.launch.watchdog import WatchOrder, watched
from dpkd.launch.worker_group import Failure
from dpkd.log import safe_output

LOOPBACK = "127.0.0.1"
EXIT_CODES: dict[type[Exception], int] = {UserError: 2, StorageError: 2, StopRequested: 75}


@dataclass(frozen=True)
class Task:
    """What the workers of a generation are to do."""

    work: Callable[[Any], None]
    argument: Any
    folder: Path
    """Of the generation."""
    num_workers: int
    threads: int | None
    order: WatchOrder | None


def enter(task: Task, rank: int, port: int) -> None:
    """Runs the task as this rank, then leaves; the workers meet in the store that listens on the port of loopback."""
    end_with_parent()
    # held until here; the driver gets them too, and passes them on as one; loader workers inherit this
    signal.signal(signal.SIGTERM, _on_stop)
    for number in set(STOP_SIGNALS) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    if rank > 0:
        _print_to(task.folder / f"{rank}.log")
    os.environ.update(_place(rank, task.num_workers, port))
    if sys.platform == "linux":  # a laptop's host name often resolves to nowhere, and nobody else is to connect
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    if task.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(task.threads)
        torch.set_num_threads(task.threads)
    exit_code = 1
    try:
        with watched(task.order, rank=rank):
            exit_code = _work(task, rank)
    except BaseException:  # noqa: BLE001  this is a process's end
        traceback.print_exc()
    if exit_code:
        _leave(exit_code)


def _work(task: Task, rank: int) -> int:
    """Does the work, and says how it ended; returns the exit code."""
    (task.folder / f"{rank}.up").touch()
    try:
        task.work(task.argument)
    except Exception as error:  # noqa: BLE001  crosses to the driver, which raises it
        part = task.folder / f"{rank}.part"
        part.write_bytes(pickle.dumps(Failure.of_error(rank, error)))
        part.rename(part.with_suffix(".pickle"))
        return EXIT_CODES.get(type(error), 1)
    (task.folder / f"{rank}.done").touch()
    return 0


def _on_stop(_number: int, _frame: FrameType | None) -> None:
    world.request_stop()


def _place(rank: int, num_workers: int, port: int) -> dict[str, str]:
    """The variables by which torch and DeepSpeed learn of their place; those of its agent stand for the driver."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_workers),
        "LOCAL_WORLD_SIZE": str(num_workers),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def _print_to(path: Path) -> None:
    with path.open("wb") as file:
        for number, stream in ((1, sys.stdout), (2, sys.stderr)):
            assert isinstance(stream, io.TextIOWrapper), stream
            stream.reconfigure(line_buffering=True)  # what was printed before a death is to be read
            os.dup2(file.fileno(), number)


def _leave(exit_code: int) -> NoReturn:
    """Ends this process without unwinding it: what torch has open aborts or hangs when its peers are gone."""
    for child in multiprocessing.active_children():
        child.kill()  # loader workers hold copies of our connections, which peers must see closed
    end_server()  # which may be stopped
    with safe_output():
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(exit_code)
