"""The pool protocol: maps a function over items in other processes, and survives their death.

One process works on one item at a time, so that a death names its item: a `concurrent.futures` pool breaks as a whole
and cannot tell which item killed it.

Storage that fails in a way that may pass is met here, by doing the whole item again, because only that holds for any
storage (a mounted disk, a read in the middle of a file); single requests are tried again by the store's own library.
"""

import logging
import pickle
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, TypeVar

from dpkd.errors import StorageUnavailable, WorkerFailed, portable
from dpkd.io.errors import may_pass
from dpkd.launch.heartbeat import RESTING, heartbeat
from dpkd.launch.watchdog import WatchOrder, read_hangs

_log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

NUM_RETRIES = 3
"""Times that an item whose worker died is tried again."""
PAUSES_S = (0.5, 1.5, 4.5)
"""Before each time that an item whose storage failed is tried again."""


class Pool(Protocol):
    """Independent work on items, in any order."""

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[tuple[int, Result]]:
        """Yields (index of the item, result) as they finish; an item whose worker died is tried again elsewhere.

        Function, items and results must pickle; a worker unpickles the function once and keeps it. An exception of
        `function` itself is raised here unchanged, and the rest of the work is cancelled, as it is when the iterator
        is closed. Raises `WorkerFailed` when `NUM_RETRIES` + 1 workers died of an item, which it names, or one after
        the other before they came up; and `StorageUnavailable`, naming the item, when its storage has failed as often.
        """


@dataclass(frozen=True)
class Accelerator:
    """A pool whose workers have an accelerator each, and its name in torch."""

    pool: Pool
    device: str


@dataclass(eq=False, kw_only=True)
class PoolWorker:
    """A process that works on one item at a time, and what became of it."""

    number: int
    index: int | None = None
    """The item that it has."""
    answer: bytes = b""
    death: str = ""
    """How it died, if it did."""
    node_lost: bool = False
    """It died with its node, or its answer did: no fault of the item."""


Worker = TypeVar("Worker", bound=PoolWorker)


class PoolWorkers(Protocol[Worker]):
    """The workers of one `map`."""

    def start(self, num_expected: int) -> None:
        """Starts workers until so many come up or work, as far as there is room."""

    def give(self, worker: Worker, item: Any) -> None:
        """Gives an item to a worker that is free."""

    def end(self, worker: Worker) -> None:
        """Ends a worker that is free, so that others can have its resources."""

    def end_all(self) -> None:
        """Ends all workers, also in the middle of an item."""

    def next(self) -> Worker | None:
        """Waits a second or so for a worker that came up, answered or died."""


def map_items(
    workers: PoolWorkers[Worker], items: Sequence[Any], *, order: WatchOrder | None
) -> Iterator[tuple[int, Any]]:
    """What `Pool.map` promises, with these workers, which are watched as ordered."""
    waiting = deque(range(len(items)))
    num_working = 0
    num_deaths: Counter[int | None] = Counter()  # by item; None: before they came up, one after the other
    try:
        while waiting or num_working:
            workers.start(len(waiting) + num_working)
            worker = workers.next()
            if worker is None:
                continue
            index, answer = worker.index, worker.answer
            num_working -= index is not None
            if worker.death:
                if index is not None:
                    waiting.appendleft(index)
                if worker.node_lost:
                    _log.info("lost a worker with its node, its work goes to others: %s", worker.death)
                else:
                    num_deaths[index] += 1
                    _judge_death(worker, num_deaths[index], items=items, order=order)
                continue
            num_deaths[None] = 0
            if waiting:
                worker.index = waiting.popleft()
                num_working += 1
                workers.give(worker, items[worker.index])
            else:
                workers.end(worker)
            if index is not None:
                yield index, result_of(answer)
    finally:
        workers.end_all()


def _judge_death(worker: PoolWorker, num_deaths: int, *, items: Sequence[Any], order: WatchOrder | None) -> None:
    """Logs the death of a worker; raises `WorkerFailed` where its item, or the start, has cost too many."""
    index, reason = worker.index, worker.death
    with suppress(OSError):  # a report that cannot be read says no more than the exit code
        reason = next((str(hang) for hang in read_hangs(order) if hang.rank == worker.number), reason)
    if index is None:
        warning = f"a worker did not come up, another is started: {reason}"
        failure = f"{num_deaths} workers did not come up, one after the other: {reason}"
    else:
        name = _short(items[index])
        warning = f"a worker died ({reason}), and another does its item: {name}"
        failure = (
            f"{num_deaths} workers died, one after the other, on item {index}: {name} ({reason}). "
            "Out of memory? Run with fewer launcher.pool_workers, or take the item out."
        )
    if num_deaths > NUM_RETRIES:
        raise WorkerFailed(failure)
    _log.warning(warning)


def _short(item: object) -> str:
    """The item as an error names it."""
    text = repr(item)
    return text if len(text) <= 200 else text[:200] + "…"


_load = lru_cache(maxsize=1)(pickle.loads)


def answer_to(function: bytes, item: bytes) -> bytes:
    """The pickled answer of a worker to a pickled item: (result, error, its traceback)."""
    heartbeat("load")
    try:
        result = _call_until_storage_answers(_load(function), pickle.loads(item))
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
    for pause_s in (*PAUSES_S, None):
        heartbeat("item")
        try:
            return function(item)
        except Exception as error:  # passed on, unless it is storage that may answer later
            if not may_pass(error):
                raise
            if pause_s is None:
                message = f"{_short(item)}: storage failed {len(PAUSES_S) + 1} times, at last with: {error}"
                raise StorageUnavailable(message) from error
            _log.warning("%s: storage failed, trying again in %.1f s: %s", _short(item), pause_s, error)
        heartbeat(RESTING)
        time.sleep(pause_s)
    raise AssertionError("never reached")
