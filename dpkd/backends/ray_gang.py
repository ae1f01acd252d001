"""Workers on a Ray cluster, under Ray Train.

Ray Train places, starts and watches one generation of workers; whether another follows is decided here
(`gang.verdict`), as for the local gang, and so is its size: Ray Train's own elasticity ends workers without having
asked them to save, and knows nothing of a batch that they must share equally. A small actor on the driver's node, the
post, carries what Ray Train does not: the request to stop to the workers, and their failures and the first one's output
to the driver.

A session of several sizes starts each generation with as many workers as the cluster has room for. While it could do
with more, it asks the cluster for their resources, which an autoscaler sees too; once it has had them for a while, all
save and start again with more. A node that is about to leave has them save too; a node that is lost costs the steps
since the last save.
"""

import contextlib
import os
import re
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from dpkd import world
from dpkd.backends.ray_post import Output, Post
from dpkd.backends.ray_room import Move, wait_for_room
from dpkd.backends.ray_session import connect, enter, node_gpus, on_this_node, rooms
from dpkd.errors import StopRequested
from dpkd.gang import UNSUPERVISED, Failure, Restart, StopRequests, Supervision, supervise, with_hangs
from dpkd.placement import Sizes, cpus_per_worker
from dpkd.report.progress import say
from dpkd.stop_signals import heeding
from dpkd.watchdog import WatchOrder, hangs, watched

POLL_S = 0.3
CAUSE_PATIENCE_S = 2.0
EXIT_STOPPED = 75
DRIVER_SETTINGS = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths of the settings mean the driver's folder
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


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
        self._use_gpu = num_gpus > 0
        self._worker = {"CPU": float(threads or 1)} | ({"GPU": 1.0} if self._use_gpu else {})
        self._max_restarts = max_restarts
        self._threads = threads
        self._stop_grace_s = stop_grace_s
        self._hang_timeout_s = hang_timeout_s

    def run(self, work: Callable[[Any], None], argument: Any, *, supervision: Supervision = UNSUPERVISED) -> None:
        """See `Gang.run`."""
        for name, value in DRIVER_SETTINGS.items():
            os.environ.setdefault(name, value)
        post, stop = on_this_node(Post, max_concurrency=100_000), StopRequests()

        def run_once() -> list[Failure]:
            no_room_for: int | None = None
            while True:
                order = supervision.order(hang_timeout_s=self._hang_timeout_s)
                task = _Task(work, argument, post, str(Path.cwd()), self._threads, order)
                wait_for_room(self._sizes.fewest, self._worker, stop_requested=lambda: stop.count > 0)
                size = self._sizes.choose(rooms(), threads=self._threads, use_gpu=self._use_gpu, below=no_room_for)
                session, move = self._run_generation(task, stop, size=size)
                no_room_for = size if session.found_no_room else None
                if no_room_for is not None:
                    continue
                failures = with_hangs(session.failures(post), hangs(order) if order is not None else [])
                saved = any(isinstance(failure.error, StopRequested) for failure in failures)
                if stop.count or not (saved and move.cause):
                    return failures
                say(f"{move.cause}; all saved and start again")
                supervision.on_restart(Restart(-1, move.cause, time.time() - move.began_s))

        with heeding(stop.on_signal):
            supervise(
                run_once,
                max_restarts=self._max_restarts,
                stop_requested=lambda: stop.count > 0,
                supervision=supervision,
            )

    def _run_generation(self, task: "_Task", stop: StopRequests, *, size: int) -> tuple["_Session", Move]:
        """Runs so many workers until they have ended."""
        if len(self._sizes.allowed) > 1:
            say(f"starts {size} workers ({self._sizes.fewest} to {self._sizes.allowed[-1]} will do)")
        ray.get(task.post.begin.remote())
        with tempfile.TemporaryDirectory(prefix="dpkd-gang-") as folder:
            trainer = TorchTrainer(
                _enter,
                train_loop_config={"task": task},
                scaling_config=self._scaling(size),
                run_config=RunConfig(  # type: ignore[call-arg]  # typed as that of version 1
                    name=uuid.uuid4().hex,
                    storage_path=folder,
                    failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),  # type: ignore[call-arg]
                    worker_runtime_env={"env_vars": _worker_variables()},
                ),
            )
            session = _Session(trainer)
            grace_s = self._stop_grace_s
            with Move(task.post, self._sizes, size=size, worker=self._worker, grace_s=grace_s) as move:
                _watch(session, task.post, stop, move, grace_s=grace_s)
        return session, move

    def _scaling(self, size: int) -> ScalingConfig:
        cpus = self._threads or max(1, cpus_per_worker(rooms(), num_workers=size, use_gpu=self._use_gpu))
        resources = {"CPU": cpus} | ({"GPU": 1} if self._use_gpu else {})
        return ScalingConfig(num_workers=size, use_gpu=self._use_gpu, resources_per_worker=resources)


@dataclass(frozen=True)
class _Task:
    work: Callable[[Any], None]
    argument: Any
    post: Any
    folder: str
    threads: int | None
    order: WatchOrder | None


class _Session:
    """A trainer that runs in a thread, so that this one stays free for signals and output."""

    def __init__(self, trainer: TorchTrainer) -> None:
        self._trainer = trainer
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._fit, name="dpkd-ray-train", daemon=True)
        self._thread.start()

    def running(self) -> bool:
        """Whether the workers are not done yet."""
        return self._thread.is_alive()

    @property
    def found_no_room(self) -> bool:
        """Whether the workers never started because the cluster had no room for them."""
        return isinstance(self._error, ControllerError) and isinstance(
            self._error.controller_failure, WorkerGroupStartupTimeoutError
        )

    def failures(self, post: Any) -> list[Failure]:
        """How the workers failed, if they did: as they told the post, or as Ray Train saw them die."""
        told: list[Failure] = ray.get(post.failures.remote())
        return self._deaths(told) + told

    def _deaths(self, told: Sequence[Failure]) -> list[Failure]:
        """The failures that Ray Train saw, of workers that did not tell of theirs: they died before the others."""
        if self._error is None:
            return []
        if not isinstance(self._error, WorkerGroupError):
            return [Failure(-1, f"Ray Train failed: {self._error}")]
        first_s = min((failure.time_s for failure in told), default=time.time())
        heard = {failure.rank for failure in told}
        deaths = {rank: error for rank, error in self._error.worker_failures.items() if rank not in heard}
        return [Failure(rank, f"died ({_gist(error)})", time_s=first_s) for rank, error in deaths.items()]

    def _fit(self) -> None:
        try:
            self._trainer.fit()
        except Exception as error:  # noqa: BLE001  looked at by `failures`
            self._error = error


def _worker_variables() -> dict[str, str]:
    """Threads that wait must not spin, as in the local gang; read once, when the process loads torch."""
    return {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}


def _gist(error: Exception) -> str:
    """Where and how a worker died, out of the page that Ray writes about it."""
    text = str(error)
    place = re.search(r"node_ip='([^']+)', pid=(\d+)", text)
    detail = re.search(r"Worker exit detail: ([^.]+)\.", text) or re.search(r"(The (?:actor|node) [^.]+)\.", text)
    words = [f"process {place[2]} on {place[1]}"] if place else []
    return ", ".join([*words, detail[1] if detail else text.splitlines()[0]])


def _watch(session: _Session, post: Any, stop: StopRequests, move: Move, *, grace_s: float) -> None:
    """Shows the workers' output and passes requests to stop on to them, until they are done."""
    passed_on = 0
    while session.running():
        if stop.count > passed_on:
            passed_on = stop.count
            ray.get(post.stop.remote(grace_s if passed_on == 1 else 0.0))
        move.look()
        _show_output(post)
        time.sleep(POLL_S)
    _show_output(post)


def _show_output(post: Any) -> None:
    sys.stdout.write(ray.get(post.take_output.remote()))
    sys.stdout.flush()


def _enter(config: dict[str, Any]) -> None:
    """The life of a worker; it runs in a thread of Ray's."""
    task: _Task = config["task"]
    enter(task.folder)
    if task.threads is not None:
        torch.set_num_threads(task.threads)
    ray.get(task.post.enter.remote(ray.get_runtime_context().get_node_id()))
    threading.Thread(target=_heed_stop, args=(task.post,), daemon=True).start()
    rank = int(os.environ["RANK"])
    output = Output(task.post)
    with contextlib.redirect_stdout(output) if rank == 0 else contextlib.nullcontext():
        try:
            with watched(task.order, rank=rank):
                task.work(task.argument)
        except Exception as error:
            ray.get(task.post.fail.remote(Failure.of_error(rank, error)))
            # Ray Train ends all once one has raised: the peer that caused this shall tell of it first
            ray.wait([task.post.until_cause.remote()], timeout=CAUSE_PATIENCE_S)
            raise
        finally:
            output.close()


def _heed_stop(post: Any) -> None:
    """Waits for the driver's request to stop, then for the time of grace, then ends this process."""
    grace_s = ray.get(post.until_stop.remote(None))
    world.request_stop()
    again = post.until_stop.remote(grace_s)
    ray.wait([again], timeout=grace_s)
    os._exit(EXIT_STOPPED)
