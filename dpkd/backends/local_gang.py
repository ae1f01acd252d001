"""Workers on this machine: processes that this one starts, watches and ends.

Not torch's elastic agent, which waits for a worker that is stopped after its work is done, or while it starts, for
ever; which tells of one failure where several workers failed, and takes the signals that ask a run to stop.
"""

import multiprocessing
import os
import pickle
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dpkd.backends.local_worker import LOOPBACK, Task, enter
from dpkd.errors import StopRequested
from dpkd.io.temporary_folder import lasting_folder
from dpkd.launch.forking import end_server, forking, load_ahead
from dpkd.launch.heartbeat import SLOW
from dpkd.launch.signals import heeding, held
from dpkd.launch.watchdog import WatchOrder
from dpkd.launch.worker_group import FOR_MEMORY, UNSUPERVISED, Failure, StopRequests, Supervision, explained, supervise
from dpkd.launch.world_size import Room

LOOK_S = 0.1
PATIENCE_S = 5.0
"""What workers have to end by themselves once one has failed, or all are done."""
SAME_S = 0.5
FOR_A_PEER = "another had failed"
LAST_BYTES = 1 << 16
EXIT_UNSEEN = 255
"""What `multiprocessing` says of a process whose fork server ended before it could tell."""


class LocalGang:
    """`num_workers` processes on this machine (none: one a GPU, or one); the first one's output is the user's.

    `threads` are the CPU threads of one worker (none: the cores shared out, unless OMP_NUM_THREADS says). Workers that
    were asked to stop are killed after `stop_grace_s`, or at a second Ctrl-C.
    """

    def __init__(
        self,
        num_workers: int | None = None,
        *,
        max_restarts: int,
        threads: int | None = None,
        stop_grace_s: float = 30.0,
        hang_timeout_s: float | None = None,
    ) -> None:
        assert num_workers is None or num_workers >= 1, num_workers
        self.num_workers = num_workers or max(1, torch.cuda.device_count())
        self._max_restarts = max_restarts
        self._threads = threads or _default_threads(self.num_workers)
        self._stop_grace_s = stop_grace_s
        self._hang_timeout_s = hang_timeout_s

    def run(self, work: Callable[[Any], None], argument: Any, *, supervision: Supervision = UNSUPERVISED) -> None:
        """See `Gang.run`."""
        modules = (__name__, work.__module__)
        stop = StopRequests()
        with lasting_folder("gang", secrets.token_hex(4)) as folder:

            def run_once() -> list[Failure]:
                generation = Path(tempfile.mkdtemp(prefix="generation-", dir=folder))
                order = WatchOrder.begin(supervision.hangs, hang_timeout_s=self._hang_timeout_s)
                task = Task(work, argument, generation, self.num_workers, self._threads, order)
                start_method = load_ahead(*modules)
                return explained(_Generation(task, stop, start_method, grace_s=self._stop_grace_s).run(), order)

            with heeding(stop.on_signal), forking(*modules):
                supervise(
                    run_once,
                    max_restarts=self._max_restarts,
                    stop_requested=lambda: stop.count > 0,
                    supervision=supervision,
                )


def room() -> Room:
    """What this machine has for workers."""
    return Room(_num_cores(), torch.cuda.device_count())


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _default_threads(num_workers: int) -> int | None:
    if "OMP_NUM_THREADS" in os.environ:
        return None
    return max(1, _num_cores() // num_workers)


class _Worker:
    """A process of a rank, and what is known of it."""

    def __init__(self, process: BaseProcess) -> None:
        assert process.pid is not None, "it has been started"
        self.process, self._pid = process, process.pid
        self.asked = False
        self.ended_for = ""
        """Why it was killed; empty where it was not."""
        self.ended_s = float("inf")
        """When it was seen to have ended."""
        self._pidfd: int | None = None
        if sys.platform == "linux":
            with suppress(OSError):  # it has ended, or the kernel is older than 5.3
                self._pidfd = os.pidfd_open(process.pid)

    @property
    def handle(self) -> int:
        """Becomes readable when it has ended; a stopped fork server tells nobody that it has."""
        return self._pidfd if self._pidfd is not None else self.process.sentinel

    def lives(self) -> bool:
        """Whether it has not ended."""
        ended = bool(connection.wait([self.handle], timeout=0))
        if ended:
            self.ended_s = min(self.ended_s, time.time())
        return not ended

    def send(self, number: signal.Signals) -> None:
        """Sends it a signal, unless it has ended."""
        if self.lives():
            with suppress(ProcessLookupError):
                if sys.platform == "linux" and self._pidfd is not None:
                    signal.pidfd_send_signal(self._pidfd, number)
                else:
                    os.kill(self._pid, number)

    def exit_code(self) -> int:
        """How it ended; negative codes are signals."""
        self.process.join(PATIENCE_S)
        if self.process.exitcode is None:
            end_server()  # which is stopped, and would tell nobody; spawned ones are our own children
            self.process.join()
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
        assert self.process.exitcode is not None, "it has been waited for"
        return self.process.exitcode


class _Generation:
    """The workers of a task from their start until all have ended, which `run` waits for."""

    def __init__(self, task: Task, stop: StopRequests, start_method: str, *, grace_s: float) -> None:
        self._task, self._stop, self._start_method, self._grace_s = task, stop, start_method, grace_s
        self._allowance_s = SLOW * task.order.hang_timeout_s if task.order is not None else float("inf")
        self._workers: dict[int, _Worker] = {}
        self._up: set[int] = set()
        self._not_started: list[Failure] = []
        self._started, self._over = threading.Event(), threading.Event()
        # seconds since the start, since there was a failure, a request to stop, nothing left to do
        self._waited_s = self._failed_s = self._stopping_s = self._done_s = 0.0

    def run(self) -> list[Failure]:
        """Runs them; returns how they failed, if they did."""
        port, _store = _listening_store()
        # a thread, because a start waits for the process to fork from, which may be stuck
        starter = threading.Thread(target=self._start, args=(port,), daemon=True)
        starter.start()
        looked_s = time.monotonic()
        try:
            while (living := self._living()) or not self._started.is_set():
                connection.wait([worker.handle for worker in living.values()], timeout=LOOK_S)
                before_s, looked_s = looked_s, time.monotonic()
                self._look(min(looked_s - before_s, 2 * LOOK_S))  # a pause of the whole machine counts little
        finally:
            self._end(self._living(), "")  # none, but for an error of ours
            self._over.set()
        starter.join()
        return self._failures()

    def _start(self, port: int) -> None:
        """Starts the workers, one after the other, as far as that succeeds."""
        rank = 0
        try:
            for rank in range(self._task.num_workers):
                self._workers[rank] = _Worker(_started(self._task, rank, port, self._start_method))
        except EOFError:
            self._not_started.append(Failure(rank, "not started: the process to fork it from was ended, or hung"))
        except Exception as error:  # noqa: BLE001  comes out as a failure
            self._not_started.append(Failure.of_error(rank, error))
        if self._not_started:
            self._end_server()  # the next ones are forked from a new one
        self._started.set()
        self._over.wait()  # spawned workers are killed with the thread that has started them

    def _look(self, passed_s: float) -> None:
        """Passes requests to stop on, and ends workers that have had their time."""
        started, told = set(self._workers), self._told()
        living = self._living()
        ended = started - living.keys()
        for worker in living.values():
            if self._stop.count and not worker.asked:
                worker.asked = True
                worker.send(signal.SIGTERM)
        self._waited_s += passed_s
        if self._stop.count or any(isinstance(failure.error, StopRequested) for failure in told.values()):
            self._stopping_s += passed_s
        elif told or self._not_started or not all(self._said(rank, "done") for rank in ended):
            self._failed_s += passed_s
        elif self._started.is_set() and all(self._said(rank, "done") for rank in living):
            self._done_s += passed_s
        if self._stop.count > 1:
            self._end(living, "ended at a second Ctrl-C")
        elif self._stopping_s > self._grace_s:
            self._end(living, f"not done {self._grace_s:.0f} s after it was asked to stop")
        elif max(self._failed_s, self._done_s) > PATIENCE_S:
            self._end(living, FOR_A_PEER)
        elif self._waited_s > self._allowance_s:
            self._up |= {rank for rank in living if self._said(rank, "up")}
            late = {rank: worker for rank, worker in living.items() if rank not in self._up}
            self._end(late, f"hung: not at work {self._allowance_s:.0f} s after it was started")

    def _end(self, workers: dict[int, _Worker], why: str) -> None:
        """Kills workers, and what keeps others from being started."""
        for worker in workers.values():
            worker.ended_for = why
            worker.send(signal.SIGKILL)
        if not self._started.is_set():
            self._end_server()

    def _end_server(self) -> None:
        if self._start_method == "forkserver":  # else it is somebody else's
            end_server()

    def _living(self) -> dict[int, _Worker]:
        return {rank: worker for rank, worker in list(self._workers.items()) if worker.lives()}

    def _said(self, rank: int, word: str) -> bool:
        return (self._task.folder / f"{rank}.{word}").exists()

    def _told(self) -> dict[int, Failure]:
        """The failures that workers wrote down."""
        return {int(path.stem): pickle.loads(path.read_bytes()) for path in sorted(self._task.folder.glob("*.pickle"))}

    def _failures(self) -> list[Failure]:
        """What workers told, and the deaths of those that left no word.

        When a worker is killed, the first to tell of a failure is often a peer whose connection broke; so a death that
        was seen about then counts as before it.
        """
        told = self._told()
        first_s = min((failure.time_s for failure in told.values()), default=time.time())
        deaths = []
        for rank, worker in sorted(self._workers.items()):
            exit_code = worker.exit_code()
            if rank in told or self._said(rank, "done") or worker.ended_for == FOR_A_PEER:
                continue
            cause = worker.ended_for or _death(rank, exit_code)
            time_s = first_s if worker.ended_s < first_s + SAME_S else worker.ended_s
            deaths.append(Failure(rank, cause + self._last_lines(rank), time_s=time_s))
        return [*self._not_started, *deaths, *told.values()]

    def _last_lines(self, rank: int, *, num_lines: int = 20) -> str:
        path = self._task.folder / f"{rank}.log"
        if not path.exists():
            return ""
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LAST_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
        return "\n".join(["", *lines[-num_lines:]])


def _started(task: Task, rank: int, port: int, start_method: str) -> BaseProcess:
    context: Any = multiprocessing.get_context(start_method)
    process: BaseProcess = context.Process(target=enter, args=(task, rank, port), name=f"dpkd-worker-{rank}")
    with held():  # until it can answer
        process.start()
    return process


def _death(rank: int, exit_code: int) -> str:
    if exit_code == EXIT_UNSEEN:
        return f"died, and with it the process that it was forked from{FOR_MEMORY}"
    return Failure.of_exit_code(rank, exit_code).cause


def _listening_store() -> tuple[int, Any]:
    """A store of torch's on a free port of loopback, in which workers meet; it ends with this object."""
    listener = socket.create_server((LOOPBACK, 0))
    port: int = listener.getsockname()[1]
    store = dist.TCPStore(  # type: ignore[attr-defined]
        LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    return port, store
