"""The pool on a Ray cluster: one actor a CPU, one item at a time each, so that a death names its item."""

import pickle
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray import cloudpickle
from ray.exceptions import RayActorError

from dpkd.backends.ray_session import connect, enter, node_cpus, node_gpus
from dpkd.errors import WorkerFailed
from dpkd.pool import NUM_RETRIES, Deaths, answer_to, result_of
from dpkd.report.progress import say

Item = TypeVar("Item")
Result = TypeVar("Result")

PATIENCE_S = 30.0
"""Seconds between two words on waiting for the cluster."""


class RayPool:
    """Actors on the cluster that this process belongs to; `num_workers` none takes one for each of its CPUs.

    With `gpus_per_worker` each takes that many GPUs and no CPU, and none takes as many workers as the GPUs allow.
    Workers for which the cluster has no room yet join when it has: an autoscaler sees them waiting.
    """

    def __init__(self, num_workers: int | None = None, *, gpus_per_worker: float = 0.0) -> None:
        connect()
        most = sum(int(gpus / gpus_per_worker) for gpus in node_gpus()) if gpus_per_worker else sum(node_cpus())
        self.num_workers = num_workers or max(1, most)
        self._resources = {"num_cpus": 0, "num_gpus": gpus_per_worker} if gpus_per_worker else {"num_cpus": 1.0}

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[tuple[int, Result]]:
        """See `Pool.map`."""
        crew = _Crew(function, self._resources)
        deaths = Deaths(items)
        waiting = deque(range(len(items)))
        try:
            while waiting or crew.num_working:
                while waiting and crew.size < min(self.num_workers, len(waiting) + crew.num_working):
                    crew.start_worker()
                worker, index, outcome = crew.next_event()
                if isinstance(outcome, RayActorError):
                    if index is None:
                        crew.count_failed_start(outcome)
                    else:
                        waiting.appendleft(index)
                        deaths.add(index, reason=str(outcome).splitlines()[0])
                    continue
                if waiting:
                    following = waiting.popleft()
                    crew.give(worker, following, items[following])
                if index is not None:
                    yield index, result_of(pickle.loads(outcome))
        finally:
            crew.dismiss()


class _Crew:
    """The actors, and what each was last asked: to come up (index none) or to work on an item."""

    def __init__(self, function: Callable[[Any], Any], resources: dict[str, Any]) -> None:
        self._function = ray.put(cloudpickle.dumps(function))
        self._actor: Any = ray.remote(max_restarts=0, max_task_retries=0, **resources)(_Worker)
        self._asked: dict[Any, tuple[Any, int | None]] = {}
        self._all: list[Any] = []
        self._num_failed_starts = 0

    @property
    def size(self) -> int:
        """Actors that come up or work."""
        return len(self._asked)

    @property
    def num_working(self) -> int:
        """Actors that work on an item."""
        return sum(index is not None for _, index in self._asked.values())

    def start_worker(self) -> None:
        """Asks for one more; its first event comes when the cluster has found room for it."""
        worker = self._actor.remote(self._function, str(Path.cwd()))
        self._all.append(worker)
        self._asked[worker.ready.remote()] = (worker, None)

    def give(self, worker: Any, index: int, item: Any) -> None:
        """Hands an item to a worker that is free."""
        self._asked[worker.answer.remote(cloudpickle.dumps(item))] = (worker, index)

    def next_event(self) -> tuple[Any, int | None, Any]:
        """Waits for (worker, index of its item or none, its pickled answer or the `RayActorError` that ended it)."""
        while True:
            done, _ = ray.wait(list(self._asked), timeout=PATIENCE_S)
            if done:
                break
            if not self.num_working:
                say(f"waiting for a free CPU of the Ray cluster; its nodes have {node_cpus()}")
        worker, index = self._asked.pop(done[0])
        try:
            return worker, index, ray.get(done[0])
        except RayActorError as death:
            return worker, index, death

    def count_failed_start(self, death: RayActorError) -> None:
        """Notes a worker that never came up; raises `WorkerFailed` when that goes on."""
        self._num_failed_starts += 1
        if self._num_failed_starts > NUM_RETRIES:
            raise WorkerFailed(f"{self._num_failed_starts} workers did not come up on the Ray cluster: {death}")

    def dismiss(self) -> None:
        """Ends all actors, whatever they are at."""
        for worker in self._all:
            ray.kill(worker)


class _Worker:
    """An actor: unpickles the function once, then answers for items."""

    def __init__(self, function: bytes, folder: str) -> None:
        enter(folder)
        self._load = lru_cache(maxsize=1)(lambda: pickle.loads(function))

    def ready(self) -> None:
        """Returns once the actor runs."""

    def answer(self, item: bytes) -> bytes:
        """The pickled answer to a pickled item."""
        return answer_to(self._load, item)
