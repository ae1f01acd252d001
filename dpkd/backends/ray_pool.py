"""The pool on a Ray cluster: one actor a CPU or GPU, one item at a time each, so that a death names its item.

The pool follows the cluster while it works: a node that joins gets workers, and the items of a node that is lost are
done elsewhere. A lost node is no fault of the items that its workers had.
"""

import math
import pickle
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray import cloudpickle
from ray.exceptions import ActorUnavailableError, ObjectLostError, OutOfMemoryError, RayActorError, RayError

from dpkd.backends.ray_cluster import cause_of_death, connect, enter_folder, living_nodes, shortage
from dpkd.launch.forking import ONE_THREAD
from dpkd.launch.heartbeat import RESTING, heartbeat
from dpkd.launch.pool import Deaths, answer_to, never, result_of
from dpkd.launch.watchdog import WatchOrder, watched
from dpkd.log import logger

Item = TypeVar("Item")
Result = TypeVar("Result")

POLL_S = 1.0
"""Seconds after which the resources of the cluster are asked for again, while nothing else happens."""
QUIET_S = 30.0
"""Seconds between two messages on waiting for the cluster."""


class RayPool:
    """Actors on the cluster that this process belongs to, each with a CPU or, if asked for, a share of a GPU.

    `num_workers` is a ceiling; None takes as many as the cluster has room for at each moment, and the attribute is
    then their number at the start. `gpus_per_worker` is a fraction up to 1, or a whole number.
    """

    def __init__(
        self, num_workers: int | None = None, *, gpus_per_worker: float = 0.0, order: WatchOrder | None = None
    ) -> None:
        assert num_workers is None or num_workers >= 1, num_workers
        assert 0 <= gpus_per_worker <= 1 or gpus_per_worker == int(gpus_per_worker), gpus_per_worker
        connect()
        self._ceiling = num_workers
        self._order, self._numbers = order, count()
        # a GPU worker takes no CPU, so that it comes up however many of them the pool for CPUs holds
        self._needs = {"GPU": float(gpus_per_worker)} if gpus_per_worker else {"CPU": 1.0}
        self.num_workers = self._limit()

    def map(
        self, function: Callable[[Item], Result], items: Sequence[Item], *, until: Callable[[], bool] = never
    ) -> Iterator[tuple[int, Result]]:
        workers = _PoolWorkers(function, needs=self._needs, order=self._order, numbers=self._numbers)
        deaths = Deaths(items, order=self._order)
        waiting = deque(range(len(items)))
        try:
            while (waiting or workers.num_working) and not until():
                for _ in range(workers.num_expected, min(self._limit(), len(waiting) + workers.num_working)):
                    workers.start_one()
                event = workers.next_event()
                if event is None:
                    continue
                if event.death is not None:
                    if event.index is not None:
                        waiting.appendleft(event.index)
                    reason = cause_of_death(event.death)
                    if event.node_lost:
                        logger.info(f"lost a worker with its node, its work goes to others: {reason}")
                    else:
                        deaths.add(event.index, number=event.worker.number, reason=reason)
                    continue
                deaths.num_failed_starts = 0
                if waiting:
                    following = waiting.popleft()
                    workers.give(event.worker, following, items[following])
                else:
                    workers.end(event.worker)
                if event.index is not None:
                    yield event.index, result_of(event.answer)
        finally:
            workers.end_all()

    def _limit(self) -> int:
        # one that waits shows an autoscaler the need
        return self._ceiling or max(1, num_fitting(living_nodes(), needs=self._needs))


def num_fitting(nodes: Sequence[Mapping[str, float]], *, needs: Mapping[str, float]) -> int:
    """How many workers fit on nodes with these resources."""
    return sum(min(int(node.get(name, 0.0) / need + 1e-6) for name, need in needs.items()) for node in nodes)


@dataclass(eq=False)
class _PoolWorker:
    """An actor, its number, and the node that it runs on, once it does."""

    actor: Any
    number: int
    node_id: str | None = None

    def is_lost_with_node(self, death: RayError) -> bool:
        """Whether the worker died because its node did."""
        if isinstance(death, RayActorError) and death.preempted:
            return True
        if self.node_id is None:
            return "node has died" in str(death)
        return not any(node["Alive"] for node in ray.nodes() if node["NodeID"] == self.node_id)


@dataclass(frozen=True)
class _Request:
    """What a worker is to do: come up (index None), work on an item, or show whether it still lives (doubt)."""

    worker: _PoolWorker
    index: int | None
    doubt: RayError | None = None


@dataclass(frozen=True)
class _Event:
    """A worker that came up, answered or died."""

    worker: _PoolWorker
    index: int | None
    """The item that it had; None while it came up."""
    answer: bytes = b""
    death: RayError | None = None
    node_lost: bool = False
    """It died with its node, or its answer did."""


class _PoolWorkers:
    """The actors and the requests that they have not answered."""

    def __init__(
        self,
        function: Callable[[Any], Any],
        *,
        needs: dict[str, float],
        order: WatchOrder | None,
        numbers: Iterator[int],
    ) -> None:
        self._function = ray.put(cloudpickle.dumps(function))
        self._needs, self._order, self._numbers = needs, order, numbers
        options: dict[str, Any] = {"num_cpus": needs.get("CPU", 0), "num_gpus": needs.get("GPU", 0), "max_restarts": 0}
        # not set in the actor: Ray may have brought in numpy by then, and a node's own OMP_NUM_THREADS wins over Ray's
        options["runtime_env"] = {"env_vars": ONE_THREAD}
        self._actor: Any = ray.remote(**options, max_task_retries=0)(_Server)
        self._requests: dict[Any, _Request] = {}
        self._all: list[_PoolWorker] = []
        self._reported_s, self._busy_s = -math.inf, time.monotonic()

    @property
    def num_expected(self) -> int:
        """Workers that come up or work."""
        return len(self._requests)

    @property
    def num_working(self) -> int:
        """Workers that work on an item."""
        return sum(request.index is not None for request in self._requests.values())

    def start_one(self) -> None:
        """Asks for one more; its first event comes when the cluster has found room for it."""
        number = next(self._numbers)
        worker = _PoolWorker(self._actor.remote(self._function, str(Path.cwd()), self._order, number), number)
        self._all.append(worker)
        self._requests[worker.actor.node.remote()] = _Request(worker, None)

    def give(self, worker: _PoolWorker, index: int, item: Any) -> None:
        """Gives an item to a worker that is free."""
        self._requests[worker.actor.answer.remote(cloudpickle.dumps(item))] = _Request(worker, index)

    def end(self, worker: _PoolWorker) -> None:
        """Ends a worker; what it held is free for others."""
        ray.kill(worker.actor)
        self._all.remove(worker)

    def end_all(self) -> None:
        """Ends all workers, whatever they are at."""
        for worker in self._all:
            ray.kill(worker.actor)

    def next_event(self) -> _Event | None:
        """Waits for an event; None if the resources of the cluster are to be asked for first."""
        done, _ = ray.wait(list(self._requests), timeout=POLL_S)
        if not done:
            self._report_waiting()
            return None
        self._busy_s = time.monotonic()
        request = self._requests.pop(done[0])
        worker = request.worker
        try:
            answer = ray.get(done[0])
        except (ActorUnavailableError, ObjectLostError) as doubt:
            # the connection broke, and Ray does not know yet what became of the worker: the next answer tells
            self._requests[worker.actor.node.remote()] = _Request(worker, request.index, doubt)
            return None
        except (RayActorError, OutOfMemoryError) as death:
            self._all.remove(worker)
            return _Event(worker, request.index, death=death, node_lost=worker.is_lost_with_node(death))
        if request.doubt is not None:  # it lives, and its answer to the item is gone
            self.end(worker)
            return _Event(worker, request.index, death=request.doubt, node_lost=True)
        if request.index is None:
            worker.node_id = answer
            return _Event(worker, None)
        return _Event(worker, request.index, answer=answer)

    def _report_waiting(self) -> None:
        """Logs what is missing while no worker works: at once if no node could hold one, and now and then."""
        now_s, nodes = time.monotonic(), living_nodes()
        has_room = num_fitting(nodes, needs=self._needs) > 0
        is_due = now_s - max(self._reported_s, self._busy_s) > QUIET_S
        if self.num_working or not (is_due or (not has_room and self._reported_s == -math.inf)):
            return
        self._reported_s = now_s
        message = shortage(self._needs, nodes=nodes, free=ray.available_resources())
        logger.info(message if has_room else f"{message}; no node has them, this goes on once one joins (`ray status`)")


class _Server:
    """The actor's own side: unpickles the function once, then answers for items."""

    def __init__(self, function: bytes, folder: str, order: WatchOrder | None, number: int) -> None:
        self._watch = watched(order, rank=number)
        self._watch.__enter__()  # until this process ends
        enter_folder(folder)
        heartbeat(RESTING)
        self._load = lru_cache(maxsize=1)(lambda: pickle.loads(function))

    def node(self) -> str:
        """The node that this runs on."""
        return str(ray.get_runtime_context().get_node_id())

    def answer(self, item: bytes) -> bytes:
        """The pickled answer to a pickled item."""
        return answer_to(self._load, item)
