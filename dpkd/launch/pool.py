"""The pool protocol: maps a function over items, in other processes, surviving their death; and its local twin.

One process works on one item at a time, so that a death names its item: a `concurrent.futures` pool breaks as a whole
and cannot tell which item killed it.

Storage that fails in a way that may pass is met here, by doing the whole item again, because only that holds for any
storage (a mounted disk, a read in the middle of a file); single requests are tried again by the store's own library.
"""

import logging
import multiprocessing
import os
import pickle
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, Protocol, TypeVar

from dpkd.errors import StorageUnavailable, WorkerFailed, portable
from dpkd.io.errors import may_pass
from dpkd.launch.forking import ONE_THREAD
from dpkd.launch.heartbeat import RESTING, heartbeat
from dpkd.launch.settings import START_TIMEOUT_S
from dpkd.launch.watchdog import WatchOrder, read_hangs, watched

_log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

NUM_RETRIES = 3
"""Times that an item whose worker died, or whose storage failed in a way that may pass, is tried again."""
FIRST_PAUSE_S, PAUSE_GROWTH = 0.5, 3.0
"""Before an item whose storage failed is tried again: 0.5, 1.5 and 4.5 s."""

END_PATIENCE_S = 5.0
"""Seconds in which a worker is to end by itself."""
POLL_S = 1.0


def never() -> bool:
    """The end of work that nobody cuts short."""
    return False


class Pool(Protocol):
    """Independent work on items, in any order."""

    num_workers: int

    def map(
        self, function: Callable[[Item], Result], items: Sequence[Item], *, until: Callable[[], bool] = never
    ) -> Iterator[tuple[int, Result]]:
        """Yields (index of the item, result) as they finish; an item whose worker died is tried again elsewhere.

        Ends early, and its workers with it, once `until` is true, which it asks every second or so. Function, items and
        results must pickle; a worker unpickles the function once and keeps it. An exception of `function` itself is
        raised here unchanged, and the rest of the work is cancelled, as it is when the iterator is closed. Raises
        `WorkerFailed` when `NUM_RETRIES` + 1 workers died of an item, which it names, or one after the other before
        they came up; and `StorageUnavailable`, naming the item, when its storage has failed as often.
        """


class Deaths(Generic[Item]):
    """Counts the workers that each item has cost, and gives an item up."""

    def __init__(self, items: Sequence[Item], *, order: WatchOrder | None = None) -> None:
        self._items, self._order = items, order
        self._num_deaths: dict[int, int] = {}
        self.num_failed_starts = 0
        """One after the other."""

    def add(self, index: int | None, *, number: int, reason: str) -> None:
        """Counts the death of worker `number` on item `index`, or before it came up (None).

        Raises `WorkerFailed` once there are too many.
        """
        try:
            reason = next((str(hang) for hang in read_hangs(self._order) if hang.rank == number), reason)
        except OSError as error:
            reason = f"{reason}; its hang report cannot be read: {error}"
        if index is None:
            self.num_failed_starts += 1
            if self.num_failed_starts > NUM_RETRIES:
                raise WorkerFailed(f"{self.num_failed_starts} workers did not come up, one after the other: {reason}")
            _log.warning("a worker did not come up, another is started: %s", reason)
            return
        num_deaths = self._num_deaths[index] = self._num_deaths.get(index, 0) + 1
        if num_deaths > NUM_RETRIES:
            raise WorkerFailed(
                f"{num_deaths} workers died, one after the other, on item {index}: {_named(self._items[index])} "
                f"({reason}). "
                "Out of memory? Run with fewer launcher.pool_workers, or take the item out."
            )
        _log.warning("a worker died (%s), and another does its item: %s", reason, _named(self._items[index]))


def _named(item: object) -> str:
    """The item as an error names it."""
    text = repr(item)
    return text if len(text) <= 200 else text[:200] + "…"


@dataclass(frozen=True)
class Accelerator:
    """A pool whose workers have an accelerator each, and its name in torch."""

    pool: Pool
    device: str


@dataclass
class _PoolWorker:
    """A process, our end of its pipe, its own environment variables, and the item that it works on."""

    number: int
    process: BaseProcess
    connection: Connection
    environment: Mapping[str, str]
    index: int | None = None
    is_up: bool = False
    starting_s: float = 0.0

    def send(self, message: Any) -> None:
        """Sends a message; if the worker is dead already, that shows when its answer is read."""
        with suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send(message)

    def receive(self) -> bytes | None:
        """What the worker sent; None if it died, also in the middle of a message."""
        try:
            return self.connection.recv_bytes()
        except (EOFError, OSError):
            return None

    def end(self) -> str:
        """Waits for the end of a worker whose pipe is closed; returns how it ended."""
        self.process.join(END_PATIENCE_S)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        late = "" if self.is_up else f", {self.starting_s:.0f} s after its start"
        return f"exit code {self.process.exitcode}{late}"


class LocalPool:
    """Spawned processes on this machine, started by each `map` and gone with it.

    Each has the variables of one of the `environments` in its environment, which no other has at the same time. One
    that gives no sign of life, on an item or while it is stopped, is ended as the `order` says; one that is not up
    after `start_timeout_s`, by this process.
    """

    def __init__(
        self,
        num_workers: int,
        *,
        environments: Sequence[Mapping[str, str]] | None = None,
        order: WatchOrder | None = None,
        start_timeout_s: float = START_TIMEOUT_S,
    ) -> None:
        assert num_workers >= 1, num_workers
        assert environments is None or len(environments) == num_workers, "one environment a worker"
        self.num_workers = num_workers
        self._environments = environments or [{}] * num_workers
        self._order, self._start_timeout_s, self._numbers = order, start_timeout_s, count()

    def map(
        self, function: Callable[[Item], Result], items: Sequence[Item], *, until: Callable[[], bool] = never
    ) -> Iterator[tuple[int, Result]]:
        deaths = Deaths(items, order=self._order)
        waiting = deque(range(len(items)))
        free = list(self._environments)
        workers: list[_PoolWorker] = []
        try:
            while (waiting or any(worker.index is not None for worker in workers)) and not until():
                while free and sum(worker.index is None for worker in workers) < len(waiting):
                    workers.append(self._start_worker(free.pop(0)))
                for worker in workers:
                    if worker.is_up and worker.index is None and waiting:
                        worker.index = waiting.popleft()
                        worker.send(items[worker.index])
                for worker in self._ready(workers):
                    message = worker.receive()
                    if message is None:
                        workers.remove(worker)
                        free.append(worker.environment)
                        if worker.index is not None:
                            waiting.appendleft(worker.index)
                        deaths.add(worker.index, number=worker.number, reason=worker.end())
                    elif worker.index is None:
                        worker.is_up = True
                        deaths.num_failed_starts = 0
                        worker.send(function)
                    else:
                        index, worker.index = worker.index, None
                        yield index, result_of(message)
        finally:
            _end_all(workers)

    def _start_worker(self, environment: Mapping[str, str]) -> _PoolWorker:
        context, number = multiprocessing.get_context("spawn"), next(self._numbers)
        ours, theirs = context.Pipe()
        arguments = (theirs, environment, self._order, number)
        process = context.Process(target=_serve, args=arguments, name="dpkd-pool", daemon=True)
        process.start()
        theirs.close()  # so that its death reads as the end of the pipe
        return _PoolWorker(number, process, ours, environment)

    def _ready(self, workers: list[_PoolWorker]) -> list[_PoolWorker]:
        """Waits a little for workers that have come up, answered or died; ends those that do not come up."""
        expected = {worker.connection: worker for worker in workers if worker.index is not None or not worker.is_up}
        began_s = time.monotonic()
        ready = wait(list(expected), timeout=POLL_S)
        passed_s = min(time.monotonic() - began_s, 2 * POLL_S)  # a pause of the whole machine counts little
        for worker in expected.values():
            if not worker.is_up:
                worker.starting_s += passed_s
                if worker.starting_s > self._start_timeout_s:
                    worker.process.kill()
        return [expected[connection] for connection in ready if isinstance(connection, Connection)]


def _end_all(workers: Sequence[_PoolWorker]) -> None:
    for worker in workers:
        worker.connection.close()
        if worker.index is not None or not worker.is_up:
            worker.process.terminate()
    for worker in workers:
        worker.end()


def _serve(connection: Connection, environment: Mapping[str, str], order: WatchOrder | None, number: int) -> None:
    """The life of a worker: receives the function, then items, until the pipe ends."""
    for ignored in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(ignored, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal group; the parent decides
    os.environ.update({**ONE_THREAD, **environment})  # before the function brings in numpy
    with watched(order, rank=number), suppress(EOFError, BrokenPipeError, ConnectionResetError):
        heartbeat(RESTING)
        connection.send_bytes(b"up")
        pickled = connection.recv_bytes()
        load = lru_cache(maxsize=1)(lambda: pickle.loads(pickled))
        while True:
            connection.send_bytes(answer_to(load, connection.recv_bytes()))


def answer_to(load: Callable[[], Callable[[Any], Any]], item: bytes) -> bytes:
    """The pickled answer of a worker to a pickled item: (result, error, its traceback)."""
    heartbeat("load")
    try:
        result = _call_until_storage_answers(load(), pickle.loads(item))
        return pickle.dumps((result, None, ""), pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # noqa: BLE001  crosses to the parent, which raises it
        trace = traceback.format_exc()
        return pickle.dumps((None, portable(error), trace), pickle.HIGHEST_PROTOCOL)
    finally:
        heartbeat(RESTING)


def result_of(answer: bytes) -> Any:
    """The result in a worker's pickled answer (result, error, its traceback); raises the error."""
    result, error, trace = pickle.loads(answer)
    if error is not None:
        raise error from RuntimeError(f"in a pool worker:\n{trace}")
    return result


def _call_until_storage_answers(function: Callable[[Any], Any], item: Any) -> Any:
    for attempt in count():
        heartbeat("item")
        try:
            return function(item)
        except Exception as error:  # passed on, unless it is storage that may answer later
            if not may_pass(error):
                raise
            if attempt == NUM_RETRIES:
                message = f"{_named(item)}: storage failed {attempt + 1} times, at last with: {error}"
                raise StorageUnavailable(message) from error
            pause_s = FIRST_PAUSE_S * PAUSE_GROWTH**attempt
            _log.warning("%s: storage failed, trying again in %.1f s: %s", _named(item), pause_s, error)
        heartbeat(RESTING)
        time.sleep(pause_s)
    raise AssertionError("never reached")
