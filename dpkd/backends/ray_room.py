"""Room for the workers of a Ray session: to wait for it, and to move where a node leaves or there is room for more.

Room is asked for as a placement group, so it is had for sure, nobody else takes it meanwhile, and an autoscaler sees
what is wanted.
"""

import time
from collections.abc import Callable, Collection
from types import TracebackType
from typing import Any, Self

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from dpkd.backends.ray_post import asked
from dpkd.backends.ray_session import draining_nodes
from dpkd.errors import StopRequested
from dpkd.launch.world_size import Sizes
from dpkd.log import logger

LOOK_S = 3.0
POLL_S = 0.2
PATIENCE_S = 10.0
"""Seconds of waiting before a word on it."""
SHORTEST_GRACE_S = 5.0
"""For a node that should have left by now, and is there all the same."""
LEAVES = "a node is about to leave the cluster"


def wait_for_room(num_workers: int, worker: dict[str, float], *, stop_requested: Callable[[], bool]) -> None:
    """Returns once the cluster has `worker` to give to each of so many; raises `StopRequested` when asked to stop."""
    group = placement_group([worker] * num_workers)
    speaks_s = time.monotonic() + PATIENCE_S
    try:
        while True:
            there = group.wait(timeout_seconds=POLL_S)
            if stop_requested():
                raise StopRequested("stopped before its workers were started; the last checkpoint stands")
            if there:
                return
            if time.monotonic() >= speaks_s:
                speaks_s = float("inf")
                logger.info(f"waiting for the Ray cluster: {_shortage(num_workers, worker)} (see `ray status`)")
    finally:
        remove_placement_group(group)


def _shortage(num_workers: int, worker: dict[str, float]) -> str:
    whole, free = ray.cluster_resources(), ray.available_resources()
    wanted = " and ".join(f"{need:g} {name}" for name, need in worker.items())
    have = " and ".join(f"{whole.get(name, 0):g} {name}s ({free.get(name, 0):g} free)" for name in worker)
    return f"{num_workers} {'workers need' if num_workers > 1 else 'worker needs'} {wanted} each, and it has {have}"


class Move:
    """Looks for a reason to move while one generation works, and asks its workers to save and stop, once.

    Use it as a context manager: what it holds of the cluster for more workers is given back at the end.
    """

    def __init__(self, post: Any, sizes: Sizes, *, size: int, worker: dict[str, float], grace_s: float) -> None:
        """`size` workers are at work, each of which takes at least `worker` of a node's resources."""
        self.cause = ""
        self.began_s = 0.0
        self._post, self._grace_s = post, grace_s
        more = sizes.above(size)
        self._wanted = [dict(worker)] * (more - size) if more is not None else []
        self._cause_of_growth = f"there is room for {more} workers instead of {size}"
        self._grow_after_s = sizes.grow_after_s
        self._group: PlacementGroup | None = None
        self._looked_s = 0.0
        self._ready_since_s: float | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._group is not None:
            remove_placement_group(self._group)

    def look(self, nodes: Collection[str]) -> None:
        """Looks every few seconds at most, once the workers are up, on these nodes."""
        if self.cause or time.monotonic() < self._looked_s + LOOK_S:
            return
        self._looked_s = time.monotonic()
        if not nodes:
            return
        draining = draining_nodes()
        left_s = [draining[node] for node in nodes if node in draining]
        if left_s:
            self._ask(LEAVES, grace_s=min(self._grace_s, max(SHORTEST_GRACE_S, min(left_s))))
        elif self._room_for_more():
            self._ask(self._cause_of_growth, grace_s=self._grace_s)

    def _room_for_more(self) -> bool:
        """Whether the resources of more workers have been had for a while; they are asked for at the first call."""
        if not self._wanted:
            return False
        if self._group is None:
            self._group = placement_group(self._wanted, strategy="PACK")
        if not self._group.wait(timeout_seconds=0.01):
            self._ready_since_s = None
            return False
        if self._ready_since_s is None:
            self._ready_since_s = time.monotonic()
        return time.monotonic() >= self._ready_since_s + self._grow_after_s

    def _ask(self, cause: str, *, grace_s: float) -> None:
        self.cause, self.began_s = cause, time.time()
        asked(self._post.stop.remote(grace_s))
