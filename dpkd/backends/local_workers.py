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
import tempfile
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
from dpkd.errors import StopRequested, StorageError, UserError
from dpkd.io.temporary_folder import lasting_folder
from dpkd.launch.forking import end_with_parent, fork_server_ends, load_ahead
from dpkd.launch.settings import START_TIMEOUT_S
from dpkd.launch.signals import STOP_SIGNALS, block_stop_signals, stop_handlers
from dpkd.launch.watchdog import WatchOrder, watched
from dpkd.launch.worker_group import (
    FOR_MEMORY,
    UNSUPERVISED,
    Failure,
    RestartPolicy,
    StopRequests,
    Supervision,
    late_start,
    run_with_restarts,
    with_reports,
)
from dpkd.launch.world_size import NodeResources
from dpkd.log import safe_output

POLL_S = 0.1
END_PATIENCE_S = 5.0
"""What workers have to end by themselves once one has failed, or all are done."""
SAME_S = 0.5
FOR_A_PEER = "another had failed"
LAST_BYTES = 1 << 16
EXIT_UNSEEN = 255
"""What `multiprocessing` gives for a process whose fork server ended first."""
LOOPBACK = "127.0.0.1"
EXIT_CODES: dict[type[Exception], int] = {UserError: 2, StorageError: 2, StopRequested: 75}


class LocalWorkers:
    """`num_workers` processes on this machine (None: one a GPU, or one); the first one's output is the user's.

    `threads` are the CPU threads of one worker (None: the cores shared out, unless OMP_NUM_THREADS says). Workers that
    were asked to stop are killed after `stop_grace_s`, or at a second Ctrl-C; workers that are not at work after
    `start_timeout_s` are killed too.
    """

    def __init__(
        self,
        num_workers: int | None = None,
        *,
        max_restarts: int,
        threads: int | None = None,
        stop_grace_s: float = 30.0,
        hang_timeout_s: float | None = None,
        start_timeout_s: float = START_TIMEOUT_S,
    ) -> None:
        assert num_workers is None or num_workers >= 1, num_workers
        self.num_workers = num_workers or max(1, torch.cuda.device_count())
        self._policy = RestartPolicy(max_restarts)
        if threads is None and "OMP_NUM_THREADS" not in os.environ:
            threads = max(1, node_resources().cpus // self.num_workers)
        self._threads = threads
        self._stop_grace_s, self._start_timeout_s = stop_grace_s, start_timeout_s
        self._hang_timeout_s = hang_timeout_s

    def run(self, work: Callable[[Any], None], argument: Any, *, supervision: Supervision = UNSUPERVISED) -> None:
        modules = (__name__, work.__module__)
        stop = StopRequests()
        with lasting_folder("workers", secrets.token_hex(4)) as folder:

            def run_once() -> list[Failure]:
                order = WatchOrder.begin(supervision.hangs, hang_timeout_s=self._hang_timeout_s)
                generation = _Generation(
                    _Task(work, argument, Path(tempfile.mkdtemp(dir=folder)), self.num_workers, self._threads, order),
                    stop,
                    grace_s=self._stop_grace_s,
                    start_timeout_s=self._start_timeout_s,
                )
                return with_reports(generation.run(load_ahead(*modules)), order)

            with stop_handlers(stop.on_signal), fork_server_ends(*modules):
                run_with_restarts(
                    run_once, policy=self._policy, stop_requested=lambda: stop.count > 0, supervision=supervision
                )


def node_resources() -> NodeResources:
    """What this machine has for workers."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return NodeResources(cpus, torch.cuda.device_count())


@dataclass(frozen=True)
class _Task:
    """What the workers of a generation are to do."""

    work: Callable[[Any], None]
    argument: Any
    folder: Path
    """Of the generation."""
    num_workers: int
    threads: int | None
    order: WatchOrder | None


class _Generation:
    """The workers of a task from their start until all have ended."""

    def __init__(self, task: _Task, stop: StopRequests, *, grace_s: float, start_timeout_s: float) -> None:
        self._task, self._stop = task, stop
        self._grace_s, self._start_timeout_s = grace_s, start_timeout_s
        self._workers: dict[int, BaseProcess] = {}
        self._not_started: list[Failure] = []
        self._asked: set[int] = set()
        self._killed_for: dict[int, str] = {}
        self._ended_s: dict[int, float] = {}
        self._state, self._state_s, self._clock_s = "working", 0.0, 0.0

    def run(self, start_method: str) -> list[Failure]:
        """Runs them; returns how they failed, if they did."""
        listener = socket.create_server((LOOPBACK, 0))
        port: int = listener.getsockname()[1]
        # where workers meet; it ends with this method
        _store = dist.TCPStore(  # type: ignore[attr-defined]
            LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        try:
            self._start(port, start_method)
            checked_s = time.monotonic()
            while living := self._living():
                connection.wait([worker.sentinel for worker in living.values()], timeout=POLL_S)
                before_s, checked_s = checked_s, time.monotonic()
                self._check(min(checked_s - before_s, 2 * POLL_S))  # a pause of the whole machine counts little
        finally:
            self._kill(self._living(), "")  # none, unless the error is ours
        return self._failures()

    def _start(self, port: int, start_method: str) -> None:
        """Starts the workers, one after the other, as far as that succeeds."""
        context: Any = multiprocessing.get_context(start_method)
        for rank in range(self._task.num_workers):
            worker = context.Process(target=_enter, args=(self._task, rank, port), name=f"dpkd-worker-{rank}")
            try:
                with block_stop_signals():  # until it has handlers of its own
                    worker.start()
            except EOFError:
                self._not_started.append(Failure(rank, "not started: the process to fork it from was ended"))
                return
            except Exception as error:  # noqa: BLE001  comes out as a failure
                self._not_started.append(Failure.of_error(rank, error))
                return
            self._workers[rank] = worker

    def _living(self) -> dict[int, BaseProcess]:
        living = {rank: worker for rank, worker in self._workers.items() if worker.is_alive()}
        for rank in self._workers.keys() - living.keys():
            self._ended_s.setdefault(rank, time.time())
        return living

    def _check(self, passed_s: float) -> None:
        """Passes requests to stop on, and kills workers that have had their time."""
        reported, living = self._reported(), self._living()
        if self._stop.count:
            for rank in living.keys() - self._asked:
                self._asked.add(rank)
                living[rank].terminate()
        done = self._ranks("done")
        ended = self._workers.keys() - living.keys()
        if self._stop.count or any(isinstance(failure.error, StopRequested) for failure in reported.values()):
            state = "stopping"
        elif reported or self._not_started or not ended <= done:
            state = "failed"
        else:
            state = "done" if living.keys() <= done else "working"
        self._clock_s += passed_s
        self._state_s = self._state_s + passed_s if state == self._state else 0.0
        self._state = state
        if self._stop.count > 1:
            self._kill(living, "ended at a second Ctrl-C")
        elif state == "stopping" and self._state_s > self._grace_s:
            self._kill(living, f"not done {self._grace_s:.0f} s after it was asked to stop")
        elif state in ("failed", "done") and self._state_s > END_PATIENCE_S:
            self._kill(living, FOR_A_PEER)
        elif self._clock_s > self._start_timeout_s:
            late = living.keys() - self._ranks("up")
            self._kill(late, late_start(self._start_timeout_s))

    def _kill(self, ranks: Collection[int], why: str) -> None:
        for rank in ranks:
            self._killed_for[rank] = why
            self._workers[rank].kill()

    def _ranks(self, word: str) -> set[int]:
        """The ranks that have written a file of this name."""
        return {int(path.stem) for path in self._task.folder.glob(f"*.{word}")}

    def _reported(self) -> dict[int, Failure]:
        """The failures that workers wrote down."""
        return {int(path.stem): pickle.loads(path.read_bytes()) for path in sorted(self._task.folder.glob("*.pickle"))}

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
            assert worker.exitcode is not None, "it has been waited for"
            cause = self._killed_for.get(rank) or Failure.of_exit_code(rank, worker.exitcode).cause
            if worker.exitcode == EXIT_UNSEEN:
                cause = f"died, and with it the process that it was forked from{FOR_MEMORY}"
            ended_s = self._ended_s.get(rank, time.time())
            time_s = first_s if ended_s < first_s + SAME_S else ended_s
            deaths.append(Failure(rank, cause + self._last_lines(rank), time_s=time_s))
        return [*self._not_started, *deaths, *reported.values()]

    def _last_lines(self, rank: int, *, num_lines: int = 20) -> str:
        path = self._task.folder / f"{rank}.log"
        if not path.exists():
            return ""
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LAST_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
        return "\n".join(["", *lines[-num_lines:]])


def _enter(task: _Task, rank: int, port: int) -> None:
    """Runs the task as this rank, then leaves; the workers meet in the store that listens on the port of loopback."""
    end_with_parent()
    # blocked until here; the driver gets them too, and passes them on as one; loader workers inherit this
    signal.signal(signal.SIGTERM, lambda *_: world.request_stop())
    for number in set(STOP_SIGNALS) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    if rank > 0:
        _print_to(task.folder / f"{rank}.log")
    os.environ |= {  # by which torch and DeepSpeed find their place; those of torch's agent stand for the driver
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(task.num_workers),
        "LOCAL_WORLD_SIZE": str(task.num_workers),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
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
        # without unwinding this process: what torch has open aborts or hangs when its peers are gone
        with safe_output():
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(exit_code)


def _work(task: _Task, rank: int) -> int:
    """Does the work, and writes down how it ended; returns the exit code."""
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


def _print_to(path: Path) -> None:
    with path.open("wb") as file:
        for number, stream in ((1, sys.stdout), (2, sys.stderr)):
            assert isinstance(stream, io.TextIOWrapper), stream
            stream.reconfigure(line_buffering=True)  # what was printed before a death is to be read
            os.dup2(file.fileno(), number)
