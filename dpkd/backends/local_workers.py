"""Workers on this machine: processes that this one starts, watches and ends.

Not torch's elastic agent: it waits for ever for a worker that is stopped after its work is done or while it starts,
reports one failure where several workers failed, and takes the signals that ask a run to stop.

What a worker leaves in the folder of its generation for the driver:

    1.up        it is at work, and watched
    1.pickle    the `Failure` with which it ended
    1.done      it has done its work
    1.log       what a worker other than the first printed
"""

import io
import multiprocessing
import os
import pickle
import secrets
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dpkd.engine import world
from dpkd.errors import StopRequested
from dpkd.io.temporary_folder import lasting_folder
from dpkd.launch.forking import end_fork_server, end_with_parent, load_ahead
from dpkd.launch.heartbeat import RunClock
from dpkd.launch.settings import LauncherSettings
from dpkd.launch.signals import STOP_SIGNALS, block_stop_signals
from dpkd.launch.watchdog import watched
from dpkd.launch.worker_group import (
    FOR_MEMORY,
    UNSUPERVISED,
    Failure,
    StopRequests,
    Supervision,
    Task,
    late_start,
    run_with_restarts,
)
from dpkd.launch.world_size import NodeResources
from dpkd.log import safe_output

POLL_S = 0.1
END_PATIENCE_S = 5.0
"""What workers have to end by themselves once one has failed, or all are done."""
SAME_S = 0.5
FOR_A_PEER = "another had failed"
LOOPBACK = "127.0.0.1"


class LocalWorkers:
    """`num_workers` processes on this machine (None: one a GPU, or one); the first one's output is the user's.

    Without `threads` in the settings they share the cores out, unless OMP_NUM_THREADS says otherwise. Workers that were
    asked to stop are killed after `stop_grace_s`, or at a second Ctrl-C; those that are not at work after
    `start_timeout_s` are killed too.
    """

    def __init__(self, num_workers: int | None, settings: LauncherSettings) -> None:
        assert num_workers is None or num_workers >= 1, num_workers
        self._num_workers = num_workers or max(1, torch.cuda.device_count())
        self._settings = settings
        self._threads = settings.threads
        if self._threads is None and "OMP_NUM_THREADS" not in os.environ:
            self._threads = max(1, node_resources().cpus // self._num_workers)

    def run(self, work: Callable[[Any], None], argument: Any, *, supervision: Supervision = UNSUPERVISED) -> None:
        modules = (__name__, work.__module__)

        def run_once(task: Task, stop: StopRequests) -> list[Failure]:
            with lasting_folder("workers", secrets.token_hex(4)) as folder:
                place = _Place(folder, self._num_workers, self._threads)
                return _Generation(task, place, stop, self._settings).run(load_ahead(*modules))

        try:
            run_with_restarts(run_once, work, argument, settings=self._settings, supervision=supervision)
        finally:
            end_fork_server(*modules)


def node_resources() -> NodeResources:
    """What this machine has for workers."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return NodeResources(cpus, torch.cuda.device_count())


@dataclass(frozen=True)
class _Place:
    """Where the workers of a generation are, and how many."""

    folder: Path
    num_workers: int
    threads: int | None


class _Generation:
    """The workers of a task from their start until all have ended."""

    def __init__(self, task: Task, place: _Place, stop: StopRequests, settings: LauncherSettings) -> None:
        self._task, self._place, self._stop, self._settings = task, place, stop, settings
        self._workers: dict[int, BaseProcess] = {}
        self._asked: set[int] = set()
        self._killed_for: dict[int, str] = {}
        self._ended_s: dict[int, float] = {}
        self._starting_s = self._stopping_s = self._ending_s = 0.0

    def run(self, start_method: str) -> list[Failure]:
        """Runs them; returns how they failed, if they did."""
        listener = socket.create_server((LOOPBACK, 0))
        port: int = listener.getsockname()[1]
        # where workers meet; it ends with this method
        _store = dist.TCPStore(  # type: ignore[attr-defined]
            LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        context: Any = multiprocessing.get_context(start_method)
        try:
            for rank in range(self._place.num_workers):
                arguments = (self._task, self._place, rank, port)
                worker = context.Process(target=_enter, args=arguments, name=f"dpkd-worker-{rank}")
                with block_stop_signals():  # until it has handlers of its own
                    worker.start()
                self._workers[rank] = worker
            clock = RunClock(POLL_S)
            while living := self._living():
                connection.wait([worker.sentinel for worker in living.values()], timeout=POLL_S)
                self._check(clock.passed_s())
        finally:
            self._kill(self._living(), "")  # none, unless one could not be started
        return self._failures()

    def _living(self) -> dict[int, BaseProcess]:
        living = {rank: worker for rank, worker in self._workers.items() if worker.is_alive()}
        for rank in self._workers.keys() - living.keys():
            self._ended_s.setdefault(rank, time.time())
        return living

    def _check(self, passed_s: float) -> None:
        """Passes requests to stop on, and kills workers that have had their time."""
        reported, living, done = self._reported(), self._living(), self._ranks("done")
        if self._stop.count:
            for rank in living.keys() - self._asked:
                self._asked.add(rank)
                living[rank].terminate()
        self._starting_s += passed_s
        ended = self._workers.keys() - living.keys()
        if self._stop.count or any(isinstance(failure.error, StopRequested) for failure in reported.values()):
            self._stopping_s += passed_s
        elif reported or not ended <= done or living.keys() <= done:
            self._ending_s += passed_s
        if self._stop.count > 1:
            self._kill(living, "ended at a second Ctrl-C")
        elif self._stopping_s > self._settings.stop_grace_s:
            self._kill(living, f"not done {self._settings.stop_grace_s:.0f} s after it was asked to stop")
        elif self._ending_s > END_PATIENCE_S:
            self._kill(living, FOR_A_PEER)
        elif self._starting_s > self._settings.start_timeout_s:
            self._kill(living.keys() - self._ranks("up"), late_start(self._settings.start_timeout_s))

    def _kill(self, ranks: Collection[int], why: str) -> None:
        for rank in ranks:
            self._killed_for[rank] = why
            self._workers[rank].kill()

    def _ranks(self, word: str) -> set[int]:
        """The ranks that have written a file of this name."""
        return {int(path.stem) for path in self._place.folder.glob(f"*.{word}")}

    def _reported(self) -> dict[int, Failure]:
        """The failures that workers wrote down."""
        paths = sorted(self._place.folder.glob("*.pickle"))
        return {int(path.stem): pickle.loads(path.read_bytes()) for path in paths}

    def _failures(self) -> list[Failure]:
        """What workers reported, and the deaths of those that reported nothing.

        When a worker is killed, the first to report a failure is often a peer whose connection broke; so a death that
        was seen about then counts as before it.
        """
        reported, done = self._reported(), self._ranks("done")
        first_s = min((failure.time_s for failure in reported.values()), default=time.time())
        deaths = []
        for rank, worker in sorted(self._workers.items()):
            worker.join()
            if rank in reported or rank in done or self._killed_for.get(rank) == FOR_A_PEER:
                continue
            exit_code = worker.exitcode
            assert exit_code is not None, "it has been waited for"
            cause = self._killed_for.get(rank) or f"exited with code {exit_code}"
            if exit_code < 0 and rank not in self._killed_for:
                known = -exit_code in set(signal.Signals)
                cause = f"killed by {signal.Signals(-exit_code).name if known else f'signal {-exit_code}'}"
                cause += FOR_MEMORY if exit_code == -signal.SIGKILL else ""
            log = self._place.folder / f"{rank}.log"
            lines = log.read_text(errors="replace").splitlines()[-20:] if log.exists() else []
            ended_s = self._ended_s.get(rank, time.time())
            time_s = first_s if ended_s < first_s + SAME_S else ended_s
            deaths.append(Failure(rank, "\n".join([cause, *lines]), time_s=time_s))
        return [*deaths, *reported.values()]


def _enter(task: Task, place: _Place, rank: int, port: int) -> None:
    """Runs the task as this rank, then leaves; the workers meet in the store that listens on the port of loopback."""
    end_with_parent()
    # blocked until here; the driver gets them too, and passes them on as one; loader workers inherit this
    signal.signal(signal.SIGTERM, lambda *_: world.request_stop())
    for number in set(STOP_SIGNALS) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    if rank > 0:
        with (place.folder / f"{rank}.log").open("wb") as file:
            for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
                assert isinstance(stream, io.TextIOWrapper), stream
                stream.reconfigure(line_buffering=True)  # what was printed before a death is to be read
                os.dup2(file.fileno(), descriptor)
    os.environ |= {  # by which torch and DeepSpeed find their place; the driver is what torch's agent would be
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(place.num_workers),
        "LOCAL_WORLD_SIZE": str(place.num_workers),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    if sys.platform == "linux":  # a laptop's host name often resolves to nowhere, and nobody else is to connect
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    if place.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(place.threads)
        torch.set_num_threads(place.threads)
    is_done = False
    try:
        with watched(task.order, rank=rank):
            (place.folder / f"{rank}.up").touch()
            is_done = _work(task, rank, folder=place.folder)
    except BaseException:  # noqa: BLE001  this is a process's end
        traceback.print_exc()
    if not is_done:
        # without unwinding this process: what torch has open aborts or hangs when its peers are gone
        with safe_output():
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(1)


def _work(task: Task, rank: int, *, folder: Path) -> bool:
    """Does the work, and writes down how it ended; returns whether it is done."""
    try:
        task.work(task.argument)
    except Exception as error:  # noqa: BLE001  crosses to the driver, which raises it
        part = folder / f"{rank}.part"
        part.write_bytes(pickle.dumps(Failure.of_error(rank, error)))
        part.rename(part.with_suffix(".pickle"))
        return False
    (folder / f"{rank}.done").touch()
    return True
