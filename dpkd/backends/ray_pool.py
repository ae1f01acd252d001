"""The pool on a Ray cluster: one actor a CPU or GPU, one item at a time each, so that a death names its item.

The pool follows the cluster while it works: a node that joins gets workers, and the items of a node that is lost are
done elsewhere. A lost node is no fault of the items that its workers had.
"""

import pickle
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray import cloudpickle
from ray.exceptions import ActorUnavailableError, ObjectLostError, OutOfMemoryError, RayActorError, RayError

from dpkd.backends.ray_session import connect, enter_folder
from dpkd.launch.forking import ONE_THREAD
from dpkd.launch.heartbeat import rest
from dpkd.launch.pool import Deaths, answer_to, never, result_of
from dpkd.launch.watchdog import WatchOrder, watched
from dpkd.log import logger

Item = TypeVar("Item")
Result = TypeVar("Result")

LOOK_S = 1.0
"""Seconds between two looks at what the cluster has room for, while nothing else happens."""
PATIENCE_S = 30.0
"""Seconds between two words on waiting for the cluster."""


class RayPool:
    """Actors on the cluster that this process belongs to, each with a CPU or, if asked for, a share of a GPU.

    `num_workers` is a ceiling; none takes as many as the cluster has room for at each moment, and the attribute then
    says how many that was at the start. `gpus_per_worker` is a fraction up to 1, or a whole number.
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
        self.num_workers = num_workers or max(1, room(nodes(), needs=self._needs))

    def map(
        self, function: Callable[[Item], Result], items: Sequence[Item], *, until: Callable[[], bool] = never
    ) -> Iterator[tuple[int, Result]]:
        """See `Pool.map`."""
        crew = _Crew(function, needs=self._needs, order=self._order, numbers=self._numbers)
        deaths = Deaths(items, order=self._order)
        waiting = deque(range(len(items)))
        try:
            while (waiting or crew.num_working) and not until():
                for _ in range(crew.size, min(self._limit(), len(waiting) + crew.num_working)):
                    crew.start_worker()
                event = crew.next_event()
                if event is None:
                    continue
                if event.death is not None:
                    if event.index is not None:
                        waiting.appendleft(event.index)
                    self._judge(event, deaths=deaths)
                    continue
                deaths.num_failed_starts = 0
                if waiting:
                    following = waiting.popleft()
                    crew.give(event.member, following, items[following])
                else:
                    crew.let_go(event.member)
                if event.index is not None:
                    yield event.index, result_of(event.answer)
        finally:
            crew.dismiss()

    def _limit(self) -> int:
        return self._ceiling or max(1, room(nodes(), needs=self._needs))  # one that waits shows an autoscaler the need

    @staticmethod
    def _judge(event: "_Event", *, deaths: Deaths[Any]) -> None:
        """Counts a death against its item, or against the cluster where the worker never came up."""
        reason = _gist(event.death)
        if event.lost:
            logger.info(f"lost a worker with its node, its work goes to others: {reason}")
        else:
            deaths.add(event.index, number=event.member.number, reason=reason)


def nodes() -> list[dict[str, float]]:
    """The resources of each node that is alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def room(nodes: Sequence[dict[str, float]], *, needs: dict[str, float]) -> int:
    """How many workers fit on nodes with these resources."""
    return sum(min(int(node.get(name, 0.0) / need + 1e-6) for name, need in needs.items()) for node in nodes)


def shortage(nodes: Sequence[dict[str, float]], *, needs: dict[str, float], free: dict[str, float]) -> str:
    """What a worker waits for, in words and numbers; `free` is what no worker of any job holds, over all nodes."""
    wanted = " and ".join(f"{need:g} {name}" for name, need in needs.items())
    have = " and ".join(
        f"{sum(node.get(name, 0.0) for node in nodes):g} {name}s ({free.get(name, 0.0):g} free)" for name in needs
    )
    waits = f"waiting for the Ray cluster: a worker needs {wanted}, and its {len(nodes)} nodes have {have}"
    if room(nodes, needs=needs):
        return waits
    return f"{waits}; no node has {wanted}: this goes on once such a node joins (see `ray status`)"


@dataclass(eq=False)
class _Member:
    """An actor, its number, and the node that it runs on, once it does."""

    actor: Any
    number: int
    node_id: str | None = None


@dataclass(frozen=True)
class _Event:
    """A worker that came up, answered or died."""

    member: _Member
    index: int | None
    """The item that it had; none while it came up."""
    answer: bytes = b""
    death: RayError | None = None
    lost: bool = False
    """It died with its node, or its answer did."""


@dataclass(frozen=True)
class _Asked:
    """What a worker was last asked: to come up (index none), to work on an item, or (doubt) whether it still lives."""

    member: _Member
    index: int | None
    doubt: RayError | None = None


class _Crew:
    """The actors and what they were asked."""

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
        self._actor: Any = ray.remote(**options, max_task_retries=0)(_Worker)
        self._asked: dict[Any, _Asked] = {}
        self._all: list[_Member] = []
        self._spoke_s: float | None = None
        self._busy_s = time.monotonic()

    @property
    def size(self) -> int:
        """Workers that come up or work."""
        return len(self._asked)

    @property
    def num_working(self) -> int:
        """Workers that work on an item."""
        return sum(asked.index is not None for asked in self._asked.values())

    def start_worker(self) -> None:
        """Asks for one more; its first event comes when the cluster has found room for it."""
        number = next(self._numbers)
        member = _Member(self._actor.remote(self._function, str(Path.cwd()), self._order, number), number)
        self._all.append(member)
        self._asked[member.actor.node.remote()] = _Asked(member, None)

    def give(self, member: _Member, index: int, item: Any) -> None:
        """Hands an item to a worker that is free."""
        self._asked[member.actor.answer.remote(cloudpickle.dumps(item))] = _Asked(member, index)

    def let_go(self, member: _Member) -> None:
        """Ends a worker; what it held is free for others."""
        ray.kill(member.actor)
        self._all.remove(member)

    def next_event(self) -> _Event | None:
        """Waits for an event; none where the cluster is to be looked at again first."""
        done, _ = ray.wait(list(self._asked), timeout=LOOK_S)
        if not done:
            self._speak_of_waiting()
            return None
        self._busy_s = time.monotonic()
        asked = self._asked.pop(done[0])
        try:
            answer = ray.get(done[0])
        except (ActorUnavailableError, ObjectLostError) as doubt:
            # the connection broke, and Ray does not know yet what became of the worker: the next answer tells
            self._asked[asked.member.actor.node.remote()] = _Asked(asked.member, asked.index, doubt)
            return None
        except (RayActorError, OutOfMemoryError) as death:
            self._all.remove(asked.member)
            return _Event(asked.member, asked.index, death=death, lost=_lost(asked.member, death))
        return self._answered(asked, answer)

    def _answered(self, asked: _Asked, answer: Any) -> _Event:
        if asked.doubt is not None:  # it lives, and its answer to the item is gone
            self.let_go(asked.member)
            return _Event(asked.member, asked.index, death=asked.doubt, lost=True)
        if asked.index is None:
            asked.member.node_id = answer
            return _Event(asked.member, None)
        return _Event(asked.member, asked.index, answer=answer)

    def dismiss(self) -> None:
        """Ends all workers, whatever they are at."""
        for member in self._all:
            ray.kill(member.actor)

    def _speak_of_waiting(self) -> None:
        """Says what is missing while no worker works: at once where no node could hold one, and now and then."""
        now_s, standing = time.monotonic(), nodes()
        never = self._spoke_s is None and not room(standing, needs=self._needs)
        if self.num_working or not (never or now_s - max(self._spoke_s or 0.0, self._busy_s) > PATIENCE_S):
            return
        self._spoke_s = now_s
        logger.info(shortage(standing, needs=self._needs, free=ray.available_resources()))


def _lost(member: _Member, death: RayError) -> bool:
    """Whether the worker died because its node did."""
    if getattr(death, "preempted", False):
        return True
    if member.node_id is None:
        return "node has died" in str(death)
    return not any(node["Alive"] for node in ray.nodes() if node["NodeID"] == member.node_id)


def _gist(death: RayError | None) -> str:
    """The cause in the page that Ray writes about a death."""
    lines = str(death).splitlines() or [""]
    return next((line for line in lines if "because" in line), lines[0]).partition(". ")[0]


class _Worker:
    """The actor's own side: unpickles the function once, then answers for items."""

    def __init__(self, function: bytes, folder: str, order: WatchOrder | None, number: int) -> None:
        self._watch = watched(order, rank=number)
        self._watch.__enter__()  # until this process ends
        enter_folder(folder)
        rest()
        self._load = lru_cache(maxsize=1)(lambda: pickle.loads(function))

    def node(self) -> str:
        """The node that this runs on."""
        return str(ray.get_runtime_context().get_node_id())

    def answer(self, item: bytes) -> bytes:
        """The pickled answer to a pickled item."""
        return answer_to(self._load, item)
