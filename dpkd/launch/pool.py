"""The pool protocol: maps a function over items in worker processes, and replaces workers that die.

A worker processes one item at a time, so the item of a dead worker is known. A `concurrent.futures` pool breaks as a
whole and does not report which item killed it.

After a temporary failure of storage the pool retries the whole item, which works for any storage (a mounted disk, a
read within a file); the library of the store retries single requests.
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
"""Number of retries of an item whose worker died."""
PAUSES_S = (0.5, 1.5, 4.5)
"""Pauses before the retries of an item whose storage failed."""


class Pool(Protocol):
    """Runs independent work on items, in any order."""

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[tuple[int, Result]]:
        """Yields (index of the item, result) in the order of completion; other workers retry the items of dead workers.

        Function, items and results must be picklable; a worker unpickles the function once. An exception of `function`
        is raised here unchanged and cancels the other items, as closing the iterator does. Raises `WorkerFailed` if
        `NUM_RETRIES` + 1 workers died on one item, with its name, or successively during their start. Raises
        `StorageUnavailable`, with the name of the item, if its storage failed as often.
        """


Accelerator = tuple[Pool, str]
"""A pool with one accelerator per worker, and the accelerator's name in torch."""


@dataclass(eq=False, kw_only=True)
class PoolWorker:
    """A process that works on one item at a time, and its last answer or death."""

    number: int
    index: int | None = None
    """Index of its current item."""
    answer: bytes = b""
    death: str = ""
    """The cause of its death; empty if it is alive."""
    node_lost: bool = False
    """Whether the worker or its answer was lost with its node, so that the item is not the cause."""


Worker = TypeVar("Worker", bound=PoolWorker)


class PoolWorkers(Protocol[Worker]):
    """The workers of one `map`."""

    def start(self, num_expected: int) -> None:
        """Starts workers until `num_expected` are starting or working, as far as resources are free."""

    def give(self, worker: Worker, item: Any) -> None:
        """Gives an item to a free worker."""

    def end(self, worker: Worker | None = None) -> None:
        """Ends a free worker and frees its resources; without one all workers, busy ones too."""

    def next(self) -> Worker | None:
        """Waits about a second; returns a worker that has started, answered or died, or None."""


def map_items(
    workers: PoolWorkers[Worker], items: Sequence[Any], *, order: WatchOrder | None
) -> Iterator[tuple[int, Any]]:
    """Implements `Pool.map` with these workers; `order` is the order of their watchdogs."""
    waiting = deque(range(len(items)))
    num_working = 0
    num_deaths: Counter[int | None] = Counter()  # by item; None: successive deaths during the start
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
        workers.end()


def _judge_death(worker: PoolWorker, num_deaths: int, *, items: Sequence[Any], order: WatchOrder | None) -> None:
    """Logs the death of a worker; raises `WorkerFailed` if too many died on its item or during the start."""
    index, reason = worker.index, worker.death
    with suppress(OSError):  # without a readable report the reason is the exit code
        reason = next((str(hang) for hang in read_hangs(order) if hang.rank == worker.number), reason)
    if index is None:
        warning = f"a worker did not come up, another is started: {reason}"
        failure = f"{num_deaths} workers did not come up, one after the other: {reason}"
    else:
        name = _short(items[index])
        warning = f"a worker died ({reason}), and another does its item: {name}"
        failure = (
            f"{num_deaths} workers died, one after the other, on item {index}: {name} ({reason}). "
            "Out of memory? Set fewer launcher.pool_workers, or remove the item."
        )
    if num_deaths > NUM_RETRIES:
        raise WorkerFailed(failure)
    _log.warning(warning)


def _short(item: object) -> str:
    """The name of the item in messages: at most 200 characters of its repr."""
    text = repr(item)
    return text if len(text) <= 200 else text[:200] + "…"


_load = lru_cache(maxsize=1)(pickle.loads)


def answer_to(function: bytes, item: bytes) -> bytes:
    """The pickled answer to a pickled item: (result, error, traceback of the error)."""
    heartbeat("load")
    try:
        result = _call_until_storage_answers(_load(function), pickle.loads(item))
        return pickle.dumps((result, None, ""), pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # noqa: BLE001 (the parent raises it)
        trace = traceback.format_exc()
        return pickle.dumps((None, portable(error), trace), pickle.HIGHEST_PROTOCOL)
    finally:
        heartbeat(RESTING)


def result_of(answer: bytes) -> Any:
    """The result in a pickled answer of `answer_to`; raises the error."""
    result, error, trace = pickle.loads(answer)
    if error is not None:
        raise error from RuntimeError(f"in a pool worker:\n{trace}")
    return result


def _call_until_storage_answers(function: Callable[[Any], Any], item: Any) -> Any:
    for pause_s in (*PAUSES_S, None):
        heartbeat("item")
        try:
            return function(item)
        except Exception as error:  # raised again, except for a temporary failure of storage
            if not may_pass(error):
                raise
            if pause_s is None:
                message = f"{_short(item)}: storage failed {len(PAUSES_S) + 1} times, at last with: {error}"
                raise StorageUnavailable(message) from error
            _log.warning("%s: storage failed, trying again in %.1f s: %s", _short(item), pause_s, error)
        heartbeat(RESTING)
        time.sleep(pause_s)
    raise AssertionError("never reached")
