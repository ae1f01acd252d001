"""A pool of processes on this machine."""

import multiprocessing
import os
import pickle
import signal
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field
from itertools import count
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from dpkd.launch.forking import ONE_THREAD
from dpkd.launch.heartbeat import RESTING, RunClock, heartbeat
from dpkd.launch.pool import Item, PoolWorker, Result, answer_to, map_items
from dpkd.launch.settings import START_TIMEOUT_S
from dpkd.launch.watchdog import WatchOrder, watched

END_PATIENCE_S = 5.0
"""Seconds in which a worker must end before it is killed."""
POLL_S = 1.0


@dataclass
class LocalPool:
    """Processes on this machine, which each `map` starts and ends.

    Each process has the variables of one of the `environments`, which no other process has at the same time. The
    watchdogs of the `order` end a process that hangs on an item or is stopped; this process ends one that has not
    started after `start_timeout_s`.
    """

    num_workers: int
    _: KW_ONLY
    environments: Sequence[Mapping[str, str]] | None = None
    order: WatchOrder | None = None
    start_timeout_s: float = START_TIMEOUT_S
    start_method: str = "spawn"
    """`forkserver` if one has loaded the function's modules."""
    numbers: Iterator[int] = field(default_factory=count)
    """Numbers of the workers, unique over all calls; reports of hangs have them in their names."""

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[tuple[int, Result]]:
        return map_items(_LocalWorkers(self, pickle.dumps(function)), items, order=self.order)


@dataclass(eq=False, kw_only=True)
class _LocalWorker(PoolWorker):
    """A process, the driver's end of its pipe, and its environment variables."""

    process: BaseProcess
    connection: Connection
    environment: Mapping[str, str]
    is_up: bool = False
    starting_s: float = 0.0

    def wait_for_end(self) -> None:
        self.connection.close()
        self.process.join(END_PATIENCE_S)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


class _LocalWorkers:
    """Processes, each with a pipe."""

    def __init__(self, pool: LocalPool, function: bytes) -> None:
        self._pool, self._function = pool, function
        self._environments = list(pool.environments or [{}] * pool.num_workers)  # unused ones
        assert len(self._environments) == pool.num_workers >= 1, "one environment per worker"
        self._all: list[_LocalWorker] = []
        self._expected: dict[Any, _LocalWorker] = {}  # starting or busy workers, by the driver's end of the pipe
        self._ready: deque[Any] = deque()  # pipes of workers among them that have started, answered or died

    def start(self, num_expected: int) -> None:
        while self._environments and len(self._expected) < num_expected:
            environment, number = self._environments.pop(0), next(self._pool.numbers)
            context: Any = multiprocessing.get_context(self._pool.start_method)
            ours, theirs = context.Pipe()
            arguments = (theirs, self._function, environment, self._pool.order, number)
            process = context.Process(target=_serve, args=arguments, name="dpkd-pool", daemon=True)
            process.start()
            theirs.close()  # so that the pipe ends when the worker dies
            worker = _LocalWorker(number=number, process=process, connection=ours, environment=environment)
            self._all.append(worker)
            self._expected[ours] = worker

    def give(self, worker: _LocalWorker, item: Any) -> None:
        self._expected[worker.connection] = worker
        with suppress(BrokenPipeError, ConnectionResetError):  # it died; reading its answer reports this
            worker.connection.send(item)

    def end(self, worker: _LocalWorker | None = None) -> None:
        ended = self._all if worker is None else [worker]
        for each in ended:
            each.connection.close()
            if each.connection in self._expected:
                each.process.terminate()
        if worker is None:
            for each in ended:
                each.wait_for_end()

    def next(self) -> _LocalWorker | None:
        if not self._ready:
            clock = RunClock(POLL_S)
            self._ready.extend(wait(list(self._expected), timeout=POLL_S))
            passed_s = clock.passed_s()
            for worker in self._expected.values():
                worker.starting_s += 0.0 if worker.is_up else passed_s
                if worker.starting_s > self._pool.start_timeout_s:
                    worker.process.kill()
        if not self._ready:
            return None
        worker = self._expected.pop(self._ready.popleft())
        try:
            worker.answer = worker.connection.recv_bytes()
            worker.is_up = True
        except (EOFError, OSError):  # it died, perhaps during a message
            self._all.remove(worker)
            self._environments.append(worker.environment)
            worker.wait_for_end()
            late = "" if worker.is_up else f", {worker.starting_s:.0f} s after its start"
            worker.death = f"exit code {worker.process.exitcode}{late}"
        return worker


def _serve(
    connection: Connection, function: bytes, environment: Mapping[str, str], order: WatchOrder | None, number: int
) -> None:
    """Runs a worker, which answers items until the pipe ends."""
    for ignored in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(ignored, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal group; the parent decides
    os.environ.update({**ONE_THREAD, **environment})  # before the function imports numpy
    with watched(order, rank=number), suppress(EOFError, BrokenPipeError, ConnectionResetError):
        heartbeat(RESTING)
        connection.send_bytes(b"up")
        while True:
            connection.send_bytes(answer_to(function, connection.recv_bytes()))
