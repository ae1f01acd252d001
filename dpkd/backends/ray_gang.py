"""Workers on a Ray cluster, under Ray Train.

Ray Train places, starts and watches one generation of workers; whether another follows is decided here
(`gang.verdict`), as for the local gang, and so is its size: Ray Train's own elasticity ends workers without having
asked them to save, and knows nothing of a batch that they must share equally.

A session of several sizes starts each generation with as many workers as the cluster has room for. While it could do
with more, it asks the cluster for their resources, which an autoscaler sees too; once it has had them for a while, all
save and start again with more. A node that is about to leave has them save too; a node that is lost costs the steps
since the last save.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from dpkd.backends.ray_generation import Generation
from dpkd.backends.ray_post import Post
from dpkd.backends.ray_room import Move, wait_for_room
from dpkd.backends.ray_session import connect, node_gpus, on_this_node, rooms
from dpkd.backends.ray_worker import Task
from dpkd.errors import StopRequested
from dpkd.launch.signals import heeding
from dpkd.launch.watchdog import WatchOrder
from dpkd.launch.worker_group import UNSUPERVISED, Failure, Restart, StopRequests, Supervision, explained, supervise
from dpkd.launch.world_size import Sizes, cpus_per_worker
from dpkd.log import logger


class RayGang:
    """Processes on the cluster, as many as `num_workers` says (none: one for each of its GPUs, or one).

    The first one's output is shown. Each worker takes an equal share of the nodes' CPUs, or `threads`, and a GPU where
    the cluster has any. Workers that were asked to stop end after `stop_grace_s`, or at a second Ctrl-C.
    """

    def __init__(
        self,
        num_workers: int | Sizes | None = None,
        *,
        max_restarts: int,
        threads: int | None = None,
        stop_grace_s: float = 30.0,
        hang_timeout_s: float | None = None,
    ) -> None:
        connect()
        num_gpus = sum(node_gpus())
        self._sizes = num_workers if isinstance(num_workers, Sizes) else Sizes((num_workers or max(1, num_gpus),))
        self._gpu = {"GPU": 1.0} if num_gpus else {}
        self._max_restarts = max_restarts
        self._threads = threads
        self._stop_grace_s = stop_grace_s
        self._hang_timeout_s = hang_timeout_s

    def run(self, work: Callable[[Any], None], argument: Any, *, supervision: Supervision = UNSUPERVISED) -> None:
        """See `Gang.run`."""
        stop = StopRequests()
        least = {"CPU": float(self._threads or 1)} | self._gpu

        def run_once() -> list[Failure]:
            crowded = False
            while True:
                size, cpus = self._wait_for_room(least, stop, crowded=crowded)
                order = WatchOrder.begin(supervision.hangs, hang_timeout_s=self._hang_timeout_s)
                post = on_this_node(Post, max_concurrency=100_000)
                task = Task(work, argument, post, str(Path.cwd()), self._threads, order)
                resources, grace_s = {"CPU": float(cpus)} | self._gpu, self._stop_grace_s
                generation = Generation(task, num_workers=size, resources=resources, grace_s=grace_s)
                try:
                    with Move(post, self._sizes, size=size, worker=least, grace_s=grace_s) as move:
                        failures = generation.run(stop, move)
                finally:
                    ray.kill(post)  # which lives on as long as a traceback that holds it
                crowded = generation.found_no_room
                if crowded:
                    logger.info(
                        f"no room came free for {size} workers with {cpus} CPUs each; they start with what is free now"
                    )
                    continue
                failures = explained(failures, order)
                saved = any(isinstance(failure.error, StopRequested) for failure in failures)
                if stop.count or not (saved and move.cause):
                    return failures
                logger.info(f"{move.cause}; all saved and start again")
                supervision.on_restart(Restart(-1, move.cause, time.time() - move.began_s))

        with heeding(stop.on_signal):
            supervise(
                run_once,
                max_restarts=self._max_restarts,
                stop_requested=lambda: stop.count > 0,
                supervision=supervision,
            )

    def _wait_for_room(self, least: dict[str, float], stop: StopRequests, *, crowded: bool) -> tuple[int, int]:
        """The number of workers to start and the CPUs for each, once there is room; raises `StopRequested`.

        They share out what the nodes have, or, where that is `crowded` by another job, what they have free.
        """
        use_gpu = bool(self._gpu)
        while True:
            here = rooms(free=crowded)
            size = self._sizes.choose(here, threads=self._threads, use_gpu=use_gpu)
            cpus = cpus_per_worker(here, num_workers=size, use_gpu=use_gpu)
            wait_for_room(self._sizes.fewest, least, stop_requested=lambda: stop.count > 0)
            if cpus:
                if len(self._sizes.allowed) > 1:
                    logger.info(f"starts {size} workers ({self._sizes.fewest} to {self._sizes.allowed[-1]} will do)")
                return size, self._threads or cpus
            crowded = False  # room has come since
