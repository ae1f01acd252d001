"""Workers on a Ray cluster, under Ray Train.

Ray Train places, starts and watches one generation of workers; whether another follows is decided by the restart
policy, as on one machine, and so is its size: Ray Train's own elasticity ends workers without having asked them to
save, and knows nothing of a batch that they must share equally.

A session of several sizes starts each generation with as many workers as the cluster has room for. While it could do
with more, it asks the cluster for their resources, which an autoscaler sees too; once it has had them for a while, all
save and start again with more. A node that is about to leave has them save too; a node that is lost costs the steps
since the last save.

The coordinator, a small actor on the driver's node, carries what Ray Train does not: the request to stop to the
workers, and their failures and the first one's output to the driver.
"""

import contextlib
import os
import secrets
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError
from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from dpkd.backends.ray_cluster import (
    ResizeMonitor,
    cause_of_death,
    connect,
    enter_folder,
    kill_actors,
    living_nodes,
    node_resources,
    on_this_node,
    wait_for_resources,
)
from dpkd.backends.ray_coordinator import Coordinator, Output, Status
from dpkd.engine import world
from dpkd.errors import StopRequested
from dpkd.io.temporary_folder import lasting_folder
from dpkd.launch.settings import START_TIMEOUT_S
from dpkd.launch.signals import stop_handlers
from dpkd.launch.watchdog import WatchOrder, watched
from dpkd.launch.worker_group import (
    UNSUPERVISED,
    Failure,
    Restart,
    RestartPolicy,
    StopRequests,
    Supervision,
    late_start,
    run_with_restarts,
    with_reports,
)
from dpkd.launch.world_size import WorldSizeRange, cpus_per_worker
from dpkd.log import logger, safe_output

CONTROLLER = "TrainController"
"""The actor that leads a generation, of which Ray Train gives no handle."""
POLL_S = 0.3
END_PATIENCE_S = 20.0
"""What Ray Train has to end workers beyond their grace period."""
CAUSE_PATIENCE_S = 2.0
EXIT_STOPPED = 75
DRIVER_SETTINGS = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",  # for their resources alone, which were free a moment before
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths of the settings mean the driver's folder
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


class RayWorkers:
    """Processes on the cluster, as many as `num_workers` says (None: one for each of its GPUs, or one).

    The first one's output is shown. Each worker takes an equal share of the nodes' CPUs, or `threads`, and a GPU if
    the cluster has any. Workers that were asked to stop end after `stop_grace_s`, or at a second Ctrl-C; a generation
    that is not at work after `start_timeout_s` fails.
    """

    def __init__(
        self,
        num_workers: int | WorldSizeRange | None = None,
        *,
        max_restarts: int,
        threads: int | None = None,
        stop_grace_s: float = 30.0,
        hang_timeout_s: float | None = None,
        start_timeout_s: float = START_TIMEOUT_S,
    ) -> None:
        connect()
        num_gpus = sum(int(node.get("GPU", 0)) for node in living_nodes())
        self._sizes = (
            num_workers
            if isinstance(num_workers, WorldSizeRange)
            else WorldSizeRange((num_workers or max(1, num_gpus),))
        )
        self._gpu = {"GPU": 1.0} if num_gpus else {}
        self._policy = RestartPolicy(max_restarts)
        self._threads = threads
        self._stop_grace_s, self._start_timeout_s = stop_grace_s, start_timeout_s
        self._hang_timeout_s = hang_timeout_s
        self._needs = {"CPU": float(threads or 1)} | self._gpu

    def run(self, work: Callable[[Any], None], argument: Any, *, supervision: Supervision = UNSUPERVISED) -> None:
        for name, value in DRIVER_SETTINGS.items():
            os.environ.setdefault(name, value)
        stop = StopRequests()

        def run_once() -> list[Failure]:
            is_crowded = False
            while True:
                size, cpus = self._wait_for_size(stop, is_crowded=is_crowded)
                order = WatchOrder.begin(supervision.hangs, hang_timeout_s=self._hang_timeout_s)
                coordinator = on_this_node(Coordinator, max_concurrency=100_000)
                generation = _Generation(
                    _Task(work, argument, coordinator, str(Path.cwd()), self._threads, order),
                    num_workers=size,
                    resources={"CPU": float(cpus)} | self._gpu,
                    grace_s=self._stop_grace_s,
                    start_timeout_s=self._start_timeout_s,
                )
                try:
                    with ResizeMonitor(
                        self._sizes,
                        size=size,
                        needs=self._needs,
                        grace_s=self._stop_grace_s,
                        stop=generation.ask_to_stop,
                    ) as resize:
                        failures = with_reports(generation.run(stop, resize), order)
                finally:
                    ray.kill(coordinator)  # which lives on as long as a traceback that holds it
                is_crowded = generation.found_no_room
                if is_crowded:
                    logger.info(
                        f"no room came free for {size} workers with {cpus} CPUs each; they start with what is free now"
                    )
                    continue
                saved = any(isinstance(failure.error, StopRequested) for failure in failures)
                if stop.count or not (saved and resize.cause):
                    return failures
                logger.info(f"{resize.cause}; all saved and start again")
                supervision.on_restart(Restart(-1, resize.cause, time.time() - resize.began_s))

        with stop_handlers(stop.on_signal):
            run_with_restarts(
                run_once, policy=self._policy, stop_requested=lambda: stop.count > 0, supervision=supervision
            )

    def _wait_for_size(self, stop: StopRequests, *, is_crowded: bool) -> tuple[int, int]:
        """The number of workers to start and the CPUs for each, once these are free; raises `StopRequested`.

        They share out what the nodes have, or what they have free if another job holds some of it.
        """
        use_gpu = bool(self._gpu)
        while True:
            nodes = node_resources(free=is_crowded)
            size = self._sizes.choose(nodes, threads=self._threads, use_gpu=use_gpu)
            cpus = cpus_per_worker(nodes, num_workers=size, use_gpu=use_gpu)
            wait_for_resources(self._sizes.fewest, self._needs, stop_requested=lambda: stop.count > 0)
            if cpus:
                if len(self._sizes.allowed) > 1:
                    logger.info(f"starts {size} workers ({self._sizes.fewest} to {self._sizes.allowed[-1]} will do)")
                return size, self._threads or cpus
            is_crowded = False  # resources came free meanwhile


@dataclass(frozen=True)
class _Task:
    """What the workers of a generation are to do."""

    work: Callable[[Any], None]
    argument: Any
    coordinator: Any
    folder: str
    """The driver's working folder."""
    threads: int | None
    order: WatchOrder | None


class _Generation:
    """So many workers of a task, each with its resources, from their start until all have ended."""

    def __init__(
        self,
        task: _Task,
        *,
        num_workers: int,
        resources: dict[str, float],
        grace_s: float,
        start_timeout_s: float,
    ) -> None:
        self._task, self._num_workers, self._resources = task, num_workers, resources
        self._grace_s, self._start_timeout_s = grace_s, start_timeout_s
        self._error: Exception | None = None
        self._ended: Failure | None = None
        """Why it was ended from here."""
        self._status = Status()

    def ask_to_stop(self, grace_s: float) -> None:
        """Asks the workers to save, and to end within the grace period."""
        self._task.coordinator.stop.remote(grace_s)

    def run(self, stop: StopRequests, resize: ResizeMonitor) -> list[Failure]:
        """Runs them until they have ended; returns how they failed, if they did."""
        with lasting_folder("workers", secrets.token_hex(4)) as folder:
            fit = threading.Thread(target=self._fit, args=(str(folder),), name="dpkd-ray-train", daemon=True)
            fit.start()  # so that this thread stays free for signals and output
            try:
                self._ended = self._watch(fit, stop, resize)
            except RayActorError as error:
                self._ended = Failure(
                    -1, f"the actor in which driver and workers meet was lost: {cause_of_death(error)}"
                )
            except GetTimeoutError:
                meeting = "the actor in which driver and workers meet was"
                self._ended = Failure(-1, f"{meeting} {late_start(self._start_timeout_s)}")
            while fit.is_alive():
                kill_actors(CONTROLLER)  # the workers go with it
                fit.join(POLL_S)
        return self._deaths() + self._status.failures

    @property
    def found_no_room(self) -> bool:
        """Whether the workers never started because the cluster had no room for them."""
        return isinstance(self._error, ControllerError) and isinstance(
            self._error.controller_failure, WorkerGroupStartupTimeoutError
        )

    def _fit(self, folder: str) -> None:
        # threads that wait must not spin, as on one machine; read once, when the process loads torch
        variables = {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}
        trainer = TorchTrainer(
            _enter,
            train_loop_config={"task": self._task},
            scaling_config=ScalingConfig(
                num_workers=self._num_workers, use_gpu="GPU" in self._resources, resources_per_worker=self._resources
            ),
            run_config=RunConfig(  # type: ignore[call-arg]  # typed as that of version 1
                name=uuid.uuid4().hex,
                storage_path=folder,
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),  # type: ignore[call-arg]
                worker_runtime_env={"env_vars": variables},
            ),
        )
        try:
            trainer.fit()
        except Exception as error:  # noqa: BLE001  `_deaths` makes failures of it
            self._error = error

    def _watch(self, fit: threading.Thread, stop: StopRequests, resize: ResizeMonitor) -> Failure | None:
        """Shows the workers' output and passes requests to stop on to them, until they are done.

        Returns early with a failure if they are not at work, or do not end, in time.
        """
        coordinator, num_passed_on, checked_s = self._task.coordinator, 0, time.monotonic()
        starting_s = stopping_s = 0.0
        while True:
            is_over = not fit.is_alive()
            self._status = ray.get(coordinator.status.remote(), timeout=self._start_timeout_s)
            with safe_output():
                sys.stdout.write(self._status.output)
                sys.stdout.flush()
            if is_over:
                return None
            if stop.count > num_passed_on:
                num_passed_on = stop.count
                if num_passed_on == 1:
                    self.ask_to_stop(self._grace_s)
                else:
                    coordinator.end.remote()
            elif not num_passed_on:
                resize.check(set(self._status.node_of.values()))
            fit.join(POLL_S)
            before_s, checked_s = checked_s, time.monotonic()
            passed_s = min(checked_s - before_s, 1.0)  # a pause of the whole machine counts little
            starting_s += passed_s
            stopping_s += passed_s if num_passed_on or resize.cause else 0.0
            late = set(range(self._num_workers)) - set(self._status.node_of)
            if late and starting_s > self._start_timeout_s:
                return Failure(min(late), late_start(self._start_timeout_s))
            if stopping_s > self._grace_s + END_PATIENCE_S:
                return Failure(-1, f"not done {stopping_s:.0f} s after they were asked to stop")

    def _deaths(self) -> list[Failure]:
        """The failures of workers that reported none: they died before the others."""
        reported = self._status.failures
        if len(self._status.done) == self._num_workers:
            return []
        if self._ended is not None:
            return [] if reported else [self._ended]
        if self._error is None:
            return []
        if not isinstance(self._error, WorkerGroupError):
            return [Failure(-1, f"Ray Train failed: {self._error}")]
        first_s = min((failure.time_s for failure in reported), default=time.time())
        ranks = {failure.rank for failure in reported}
        deaths = {rank: error for rank, error in self._error.worker_failures.items() if rank not in ranks}
        return [Failure(rank, f"died ({cause_of_death(error)})", time_s=first_s) for rank, error in deaths.items()]


def _enter(config: dict[str, Any]) -> None:
    """Runs the `task` of the config as the rank that Ray Train gave this process, in a thread of Ray's."""
    task: _Task = config["task"]
    enter_folder(task.folder)
    if task.threads is not None:
        torch.set_num_threads(task.threads)
    rank = int(os.environ["RANK"])
    ray.get(task.coordinator.enter.remote(rank, ray.get_runtime_context().get_node_id()))
    threading.Thread(target=_end_when_asked, args=(task.coordinator,), daemon=True).start()
    output = Output(task.coordinator)
    with contextlib.redirect_stdout(output) if rank == 0 else contextlib.nullcontext():
        try:
            with watched(task.order, rank=rank):
                _work(task, rank)
        finally:
            output.close()


def _work(task: _Task, rank: int) -> None:
    """Does the work, and reports how it ended."""
    try:
        task.work(task.argument)
    except Exception as error:  # crosses to the driver too
        ray.get(task.coordinator.fail.remote(Failure.of_error(rank, error)))
        # Ray Train ends all once one has raised: the peer that caused this shall report first
        ray.wait([task.coordinator.wait_for_cause.remote()], timeout=CAUSE_PATIENCE_S)
        raise
    ray.get(task.coordinator.done.remote(rank))


def _end_when_asked(coordinator: Any) -> None:
    """Waits for the request to stop, then for the grace period, then ends this process; at once without coordinator."""
    with contextlib.suppress(RayActorError):
        grace_s = ray.get(coordinator.wait_for_stop.remote())
        world.request_stop()
        ray.wait([coordinator.wait_for_end.remote()], timeout=grace_s)
    os._exit(EXIT_STOPPED)
