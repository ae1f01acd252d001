"""The pool protocol: maps a function over items, in other processes, surviving their death; and its local twin.

One process works on one item at a time, so that a death names its item: a `concurrent.futures` pool breaks as a whole
and cannot tell which item killed it.
"""

import multiprocessing
import os
import pickle
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, Protocol, TypeVar

from dpkd.errors import WorkerFailed, portable

Item = TypeVar("Item")
Result = TypeVar("Result")

NUM_RETRIES = 3
"""Times that an item whose worker died is tried again."""


class Pool(Protocol):
    """Independent work on items, in any order."""

    num_workers: int

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[tuple[int, Result]]:
        """Yields (index of the item, result) as they finish; an item whose worker died is tried again elsewhere.

        Function, items and results must pickle; a worker unpickles the function once and keeps it. An exception of
        `function` itself is raised here unchanged, and the rest of the work is cancelled, as it is when the iterator is
        closed. Raises `WorkerFailed`, naming the item, when it has cost `NUM_RETRIES` + 1 workers.
        """


class Deaths(Generic[Item]):
    """Counts the workers that each item has cost, and gives an item up."""

    def __init__(self, items: Sequence[Item]) -> None:
        self._items = items
        self._num_deaths: dict[int, int] = {}

    def add(self, index: int, *, reason: str) -> None:
        """Notes a worker that died on item `index`; raises `WorkerFailed` once it has cost too many."""
        num_deaths = self._num_deaths[index] = self._num_deaths.get(index, 0) + 1
        if num_deaths > NUM_RETRIES:
            item = repr(self._items[index])
            item = item if len(item) <= 200 else item[:200] + "…"
            raise WorkerFailed(
                f"{num_deaths} workers died, one after the other, on item {index}: {item} ({reason}). "
                "Out of memory? Run with fewer launcher.pool_workers, or take the item out."
            )


@dataclass
class _Worker:
    """A process, our end of its pipe, and the item that it works on."""

    process: BaseProcess
    connection: Connection
    index: int | None = None


class LocalPool:
    """Spawned processes on this machine, started by each `map` and gone with it."""

    def __init__(self, num_workers: int) -> None:
        assert num_workers >= 1, num_workers
        self.num_workers = num_workers

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[tuple[int, Result]]:
        """See `Pool.map`."""
        deaths = Deaths(items)
        waiting = deque(range(len(items)))
        workers: list[_Worker] = []
        try:
            while waiting or any(worker.index is not None for worker in workers):
                while waiting and len(workers) < self.num_workers:
                    workers.append(_start_worker(function))
                for worker in workers:
                    if worker.index is None and waiting:
                        worker.index = waiting.popleft()
                        _give(worker, items[worker.index])
                for worker in _ready(workers):
                    answer = _answer(worker)
                    index, worker.index = worker.index, None
                    assert index is not None
                    if answer is not None:
                        yield index, result_of(answer)
                        continue
                    workers.remove(worker)
                    worker.process.join()
                    waiting.appendleft(index)
                    deaths.add(index, reason=f"exit code {worker.process.exitcode}")
        finally:
            _stop(workers)


def _start_worker(function: Callable[[Any], Any]) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), name="dpkd-pool", daemon=True)
    process.start()
    theirs.close()  # so that its death reads as the end of the pipe
    worker = _Worker(process, ours)
    _give(worker, function)
    return worker


def _give(worker: _Worker, message: Any) -> None:
    """Sends a message; a worker that is dead already shows when its answer is read."""
    try:
        worker.connection.send(message)
    except (BrokenPipeError, ConnectionResetError):
        pass


def _ready(workers: list[_Worker]) -> list[_Worker]:
    """Waits until some working process has answered or died."""
    working = {worker.connection: worker for worker in workers if worker.index is not None}
    return [working[connection] for connection in wait(list(working)) if isinstance(connection, Connection)]


def _answer(worker: _Worker) -> tuple[Any, Exception | None, str] | None:
    """The worker's answer (result, error, its traceback), or none when it died."""
    try:
        answer: tuple[Any, Exception | None, str] = worker.connection.recv()
    except (EOFError, ConnectionResetError):
        return None
    return answer


def result_of(answer: tuple[Any, Exception | None, str]) -> Any:
    """The result in a worker's answer; raises its error."""
    result, error, trace = answer
    if error is not None:
        raise error from RuntimeError(f"in a pool worker:\n{trace}")
    return result


def _stop(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.connection.close()
        if worker.index is not None:
            worker.process.terminate()
    for worker in workers:
        worker.process.join(5)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()


def _serve(connection: Connection) -> None:
    """The life of a worker: receives the function, then items, until the pipe ends."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal group; the parent decides
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"  # before the function brings in numpy: the processes share the cores already
    try:
        pickled = connection.recv_bytes()
        load = lru_cache(maxsize=1)(lambda: pickle.loads(pickled))
        while True:
            connection.send_bytes(answer_to(load, connection.recv_bytes()))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def answer_to(load: Callable[[], Callable[[Any], Any]], item: bytes) -> bytes:
    """The pickled answer of a worker to a pickled item: (result, error, its traceback)."""
    try:
        result = load()(pickle.loads(item))
        return pickle.dumps((result, None, ""), pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # noqa: BLE001  crosses to the parent, which raises it
        trace = traceback.format_exc()
        return pickle.dumps((None, portable(error), trace), pickle.HIGHEST_PROTOCOL)
