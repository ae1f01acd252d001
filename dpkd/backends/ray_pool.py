"""The pool on a Ray cluster: one actor per CPU or GPU, with one item at a time, so the item of a dead actor is known.

The pool follows the cluster: it starts workers on new nodes, and other nodes process the items of a lost node. The loss
of a node does not count against the items of its workers.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray import cloudpickle
from ray.exceptions import ActorUnavailableError, ObjectLostError, OutOfMemoryError, RayActorError, RayError

from dpkd.backends.ray_cluster import answering_nodes, cause_of_death, connect, enter_folder, living_nodes, shortage
from dpkd.launch.forking import ONE_THREAD
from dpkd.launch.heartbeat import RESTING, heartbeat
from dpkd.launch.pool import PoolWorker, answer_to, map_items
from dpkd.launch.watchdog import WatchOrder, watched
from dpkd.log import logger

Item = TypeVar("Item")
Result = TypeVar("Result")

POLL_S = 1.0
"""Longest wait in seconds between two checks of the cluster's resources."""
QUIET_S = 30.0
"""Seconds between two messages while the pool waits for the cluster."""


class RayPool:
    """Actors on the cluster of this process, each with one `resource`, which is CPU or GPU.

    `num_workers` is a maximum; None means as many as fit on the cluster at each time. A worker with a GPU uses no CPU,
    so that it starts even if the pool for CPUs holds all of them.
    """

    def __init__(
        self, num_workers: int | None = None, *, resource: str = "CPU", order: WatchOrder | None = None
    ) -> None:
        connect()
        self._ceiling, self.resource, self.order, self.numbers = num_workers, resource, order, count()

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[tuple[int, Result]]:
        return map_items(_RayWorkers(self, function), items, order=self.order)

    def limit(self) -> int:
        """The most workers at this time, at least one, because a waiting worker shows an autoscaler the need."""
        return self._ceiling or max(1, num_fitting(living_nodes(), self.resource))


def num_fitting(nodes: Sequence[Mapping[str, float]], resource: str) -> int:
    """The number of workers that fit on nodes with these resources, each with one of the `resource`."""
    return sum(int(node.get(resource, 0.0)) for node in nodes)


@dataclass(eq=False, kw_only=True)
class _RayWorker(PoolWorker):
    """An actor, and its node after it has started."""

    actor: Any
    node_id: str | None = None
    doubt: RayError | None = None
    """The error after which it is unknown whether the actor is alive."""


class _RayWorkers:
    """The actors and their open requests."""

    def __init__(self, pool: RayPool, function: Callable[[Any], Any]) -> None:
        self._pool, self._function = pool, ray.put(cloudpickle.dumps(function))
        self._all: list[_RayWorker] = []
        self._expected: dict[Any, _RayWorker] = {}  # starting or busy workers, by the future of their answer
        self._reported_s, self._busy_s = -math.inf, time.monotonic()

    def start(self, num_expected: int) -> None:
        # not set in the actor: Ray may have imported numpy before, and OMP_NUM_THREADS of the node overrides Ray's
        options: dict[str, Any] = {"num_cpus": 0, f"num_{self._pool.resource.lower()}s": 1, "max_restarts": 0}
        for _ in range(len(self._expected), min(self._pool.limit(), num_expected)):
            number = next(self._pool.numbers)
            actor = ray.remote(**options, max_task_retries=0, runtime_env={"env_vars": ONE_THREAD})(_Server).remote(
                self._function, str(Path.cwd()), self._pool.order, number
            )
            worker = _RayWorker(number=number, actor=actor)
            self._all.append(worker)
            self._expected[worker.actor.node.remote()] = worker

    def give(self, worker: _RayWorker, item: Any) -> None:
        self._expected[worker.actor.answer.remote(cloudpickle.dumps(item))] = worker

    def end(self, worker: _RayWorker | None = None) -> None:
        for each in list(self._all) if worker is None else [worker]:
            ray.kill(each.actor)
            self._all.remove(each)

    def next(self) -> _RayWorker | None:
        done, _ = ray.wait(list(self._expected), timeout=POLL_S)
        if not done:
            self._report_waiting()
            return None
        self._busy_s = time.monotonic()
        worker = self._expected.pop(done[0])
        try:
            answer = ray.get(done[0])
        except (ActorUnavailableError, ObjectLostError) as doubt:
            # the connection broke and Ray does not know yet whether the worker is alive: the next answer shows it
            worker.doubt = doubt
            self._expected[worker.actor.node.remote()] = worker
            return None
        except (RayActorError, OutOfMemoryError) as death:
            self._all.remove(worker)
            is_preempted = isinstance(death, RayActorError) and death.preempted
            living = answering_nodes()
            is_known_lost = "node has died" in str(death) if worker.node_id is None else worker.node_id not in living
            worker.death, worker.node_lost = cause_of_death(death), is_preempted or is_known_lost
            return worker
        if worker.doubt is not None:  # it is alive, but its answer to the item is lost
            self.end(worker)
            worker.death, worker.node_lost = cause_of_death(worker.doubt), True
        elif worker.index is None:
            worker.node_id = answer
        else:
            worker.answer = answer
        return worker

    def _report_waiting(self) -> None:
        """Logs missing resources while no worker is busy: at once if no node is large enough, and every `QUIET_S`."""
        now_s, nodes = time.monotonic(), living_nodes()
        has_room = num_fitting(nodes, self._pool.resource) > 0
        is_due = now_s - max(self._reported_s, self._busy_s) > QUIET_S or (
            not has_room and self._reported_s == -math.inf
        )
        if not is_due or any(worker.index is not None for worker in self._expected.values()):
            return
        self._reported_s = now_s
        message = shortage({self._pool.resource: 1.0}, nodes=nodes, free=ray.available_resources())
        logger.info(message if has_room else f"{message}; no node has them, this goes on once one joins (`ray status`)")


class _Server:
    """The class of the actor."""

    def __init__(self, function: bytes, folder: str, order: WatchOrder | None, number: int) -> None:
        self._function = function
        self._watch = watched(order, rank=number)
        self._watch.__enter__()  # until this process ends
        enter_folder(folder)
        heartbeat(RESTING)

    def node(self) -> str:
        """The id of the actor's node."""
        return str(ray.get_runtime_context().get_node_id())

    def answer(self, item: bytes) -> bytes:
        """The pickled answer to a pickled item."""
        return answer_to(self._function, item)
