"""Training workers on this machine: processes that this one starts, watches and ends.

The elastic agent of torch is not used: it waits forever for a worker that is stopped during its start or after its
work, reports only one of several failures, and handles the signals that ask a run to stop.

A worker writes these files for the driver into the folder of its generation:

    1.up        the worker has started, and is watched
    1.pickle    its `Failure`
    1.done      it has finished its work
    1.log       its output, except that of the first worker
"""

import ctypes
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
"""Seconds in which workers must end after one has failed or all are done; then they are killed."""
SAME_S = 0.5
FOR_A_PEER = "another had failed"
LOOPBACK = "127.0.0.1"


class LocalWorkers:
    """`num_workers` processes on this machine (None: one per GPU, or one); the output of the first one is shown.

    Without `threads` in the settings they divide the cores equally, unless OMP_NUM_THREADS is set. Workers that were
    asked to stop are killed after `stop_grace_s`, or at a second Ctrl-C; workers that have not started after
    `start_timeout_s` are killed too. Their fork server loads `module` (None: that of the work).
    """

    def __init__(self, num_workers: int | None, settings: LauncherSettings, *, module: str | None = None) -> None:
        assert num_workers is None or num_workers >= 1, num_workers
        self._num_workers = num_workers or max(1, node_resources().gpus)
        self._settings, self._module = settings, module
        self._threads = settings.threads
        if self._threads is None and "OMP_NUM_THREADS" not in os.environ:
            self._threads = max(1, node_resources().cpus // self._num_workers)

    def run(self, work: Callable[[Any], None], argument: Any, *, supervision: Supervision = UNSUPERVISED) -> None:
        modules = (__name__, self._module or work.__module__)

        def run_once(task: Task, stop: StopRequests) -> list[Failure]:
            with lasting_folder("workers", secrets.token_hex(4)) as folder:
                place = _Place(folder, self._num_workers, self._threads)
                return _Generation(task, place, stop, self._settings).run(load_ahead(*modules))

        try:
            run_with_restarts(run_once, work, argument, settings=self._settings, supervision=supervision)
        finally:
            end_fork_server(*modules)


def node_resources() -> NodeResources:
    """The CPUs and GPUs of this machine for workers."""
    cpus = len(os.sched_getaffinity(0))
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        if not Path("/dev/kfd").exists():
            return NodeResources(cpus, 0)  # neither CUDA nor ROCm: this process needs no torch to count GPUs
    import torch  # noqa: PLC0415

    return NodeResources(cpus, torch.cuda.device_count())


@dataclass(frozen=True)
class _Place:
    """The folder, number and threads of the workers of a generation."""

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
        """Runs the workers; returns their failures."""
        listener = socket.create_server((LOOPBACK, 0))
        port: int = listener.getsockname()[1]
        if self._place.num_workers > 1:  # else the worker needs no store, and this process no torch
            import torch.distributed as dist  # noqa: PLC0415

            # the store of the process group; it ends with this method
            _store = dist.TCPStore(  # type: ignore[attr-defined]
                LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
            )
        context: Any = multiprocessing.get_context(start_method)
        try:
            for rank in range(self._place.num_workers):
                arguments = (self._task, self._place, rank, port)
                worker = context.Process(target=_enter, args=arguments, name=f"dpkd-worker-{rank}")
                try:
                    with block_stop_signals():  # until the worker has installed its handlers
                        worker.start()
                except (EOFError, ConnectionError):
                    return [Failure(rank, "not started: the process to fork it from was ended")]
                self._workers[rank] = worker
            clock = RunClock(POLL_S)
            while living := self._living():
                connection.wait([worker.sentinel for worker in living.values()], timeout=POLL_S)
                self._check(clock.passed_s())
        finally:
            self._kill(self._living(), "")  # none is left, unless a start failed
        return self._failures()

    def _living(self) -> dict[int, BaseProcess]:
        living = {rank: worker for rank, worker in self._workers.items() if worker.is_alive()}
        for rank in self._workers.keys() - living.keys():
            self._ended_s.setdefault(rank, time.time())
        return living

    def _check(self, passed_s: float) -> None:
        """Passes stop requests to the workers, and kills workers whose time is over."""
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

    def _kill(self, ranks: Collection[int], cause: str) -> None:
        for rank in ranks:
            self._killed_for[rank] = cause
            self._workers[rank].kill()

    def _ranks(self, word: str) -> set[int]:
        """The ranks that have written a file `<rank>.<word>`."""
        return {int(path.stem) for path in self._place.folder.glob(f"*.{word}")}

    def _reported(self) -> dict[int, Failure]:
        """The failures that workers reported, by rank."""
        paths = sorted(self._place.folder.glob("*.pickle"))
        return {int(path.stem): pickle.loads(path.read_bytes()) for path in paths}

    def _failures(self) -> list[Failure]:
        """The failures that workers reported, and the deaths of workers without a report.

        If a worker is killed, a peer with a broken connection often reports its failure first. So a death seen less
        than `SAME_S` later counts as earlier.
        """
        reported, done = self._reported(), self._ranks("done")
        first_s = min((failure.time_s for failure in reported.values()), default=time.time())
        deaths = []
        for rank, worker in sorted(self._workers.items()):
            worker.join()
            if rank in reported or rank in done or self._killed_for.get(rank) == FOR_A_PEER:
                continue
            exit_code = worker.exitcode
            assert exit_code is not None, "the worker has been joined"
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
    """Runs the task as this rank; the store of the process group listens on `port` of the loopback interface."""
    end_with_parent()
    # not at the top: the driver loads this module too
    import torch  # noqa: PLC0415

    from dpkd.engine import world  # noqa: PLC0415

    # signals were blocked until now; the driver gets them too and sends SIGTERM; loader workers inherit this
    signal.signal(signal.SIGTERM, lambda *_: world.request_stop())
    for number in set(STOP_SIGNALS) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    if rank > 0:
        with (place.folder / f"{rank}.log").open("wb") as file:
            for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
                assert isinstance(stream, io.TextIOWrapper), stream
                stream.reconfigure(line_buffering=True)  # the log must hold the output before a death
                os.dup2(file.fileno(), descriptor)
    os.environ |= {  # torch and DeepSpeed read these; the driver replaces torch's agent
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(place.num_workers),
        "LOCAL_WORLD_SIZE": str(place.num_workers),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo")  # a laptop's host name often does not resolve, and no other machine connects
    if place.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(place.threads)
        torch.set_num_threads(place.threads)
    is_done = False
    try:
        with watched(task.order, rank=rank):
            (place.folder / f"{rank}.up").touch()
            try:
                task.work(task.argument)
                (place.folder / f"{rank}.done").touch()
                is_done = True
            except Exception as error:  # noqa: BLE001 (the driver raises it)
                part = place.folder / f"{rank}.part"
                part.write_bytes(pickle.dumps(Failure.of_error(rank, error)))
                part.rename(part.with_suffix(".pickle"))
    except BaseException:  # noqa: BLE001 (the process ends here)
        traceback.print_exc()
    if not is_done:
        # without cleanup: open connections of torch abort or hang after the peers have ended
        with safe_output():
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(1)
