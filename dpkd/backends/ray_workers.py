"""Training workers on a Ray cluster, with Ray Train.

Ray Train places, starts and watches one generation of workers. As on one machine, the restart policy of dpkd decides on
further generations and their size: the elasticity of Ray Train ends workers before they save, and does not know that
workers must share a batch equally.

A session of several sizes starts each generation with as many workers as fit on the cluster. If more are allowed, it
requests their resources, which an autoscaler sees too; after it has had them for some time, all workers save and
restart with more. They also save and restart if a node is about to leave. The loss of a node costs the steps since the
last save.

The coordinator, a small actor on the driver's node, sends the stop request to the workers, and their failures and the
output of the first one to the driver, which Ray Train does not do.
"""

import contextlib
import os
import secrets
import sys
import threading
import time
import uuid
from collections.abc import Callable
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
from dpkd.launch.heartbeat import RunClock
from dpkd.launch.settings import LauncherSettings
from dpkd.launch.watchdog import watched
from dpkd.launch.worker_group import (
    UNSUPERVISED,
    Failure,
    Restart,
    StopRequests,
    Supervision,
    Task,
    late_start,
    run_with_restarts,
)
from dpkd.launch.world_size import WorldSizeRange, cpus_per_worker
from dpkd.log import logger, safe_output

CONTROLLER = "TrainController"
"""Class name of the actor that controls a generation; Ray Train gives no handle to it."""
POLL_S = 0.3
CAUSE_PATIENCE_S = 2.0
DRIVER_SETTINGS = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",  # only for resources, which were free just before
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths in settings are relative to the driver's folder
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


class RayWorkers:
    """`num_workers` processes on the cluster (None: one per GPU, or one); the output of the first one is shown.

    Each worker uses an equal share of the nodes' CPUs, or `threads`, and a GPU if the cluster has any. Workers that
    were asked to stop are ended after `stop_grace_s`, or at a second Ctrl-C; a generation that has not started after
    `start_timeout_s` fails.
    """

    def __init__(self, num_workers: int | WorldSizeRange | None, settings: LauncherSettings) -> None:
        connect()
        num_gpus = sum(int(node.get("GPU", 0)) for node in living_nodes())
        if not isinstance(num_workers, WorldSizeRange):
            num_workers = WorldSizeRange((num_workers or max(1, num_gpus),))
        self._sizes, self._settings = num_workers, settings
        self._gpu = {"GPU": 1.0} if num_gpus else {}
        self._needs = {"CPU": float(settings.threads or 1)} | self._gpu

    def run(self, work: Callable[[Any], None], argument: Any, *, supervision: Supervision = UNSUPERVISED) -> None:
        for name, value in DRIVER_SETTINGS.items():
            os.environ.setdefault(name, value)
        run_with_restarts(self._run_once, work, argument, settings=self._settings, supervision=supervision)

    def _run_once(self, task: Task, stop: StopRequests) -> list[Failure] | Restart:
        is_crowded = False
        while True:
            size, cpus = self._wait_for_size(stop, is_crowded=is_crowded)
            resources = {"CPU": float(cpus)} | self._gpu
            generation = _Generation(task, num_workers=size, resources=resources, settings=self._settings)
            with ResizeMonitor(self._sizes, size=size, needs=self._needs) as resize:
                failures = generation.run(stop, resize)
            if failures is not None:
                break
            is_crowded = True
            logger.info(f"no room came free for {size} workers with {cpus} CPUs each; they start with what is free now")
        has_saved = any(isinstance(failure.error, StopRequested) for failure in failures)
        if has_saved and resize.cause and not stop.count:
            return Restart(-1, resize.cause, time.time() - resize.began_s)
        return failures

    def _wait_for_size(self, stop: StopRequests, *, is_crowded: bool) -> tuple[int, int]:
        """Waits for resources; returns the number of workers and the CPUs of each. Raises `StopRequested`.

        The workers divide all CPUs of the nodes, or the free CPUs if `is_crowded` by another job.
        """
        use_gpu, threads = bool(self._gpu), self._settings.threads
        while True:
            nodes = node_resources(free=is_crowded)
            size = self._sizes.choose(nodes, threads=threads, use_gpu=use_gpu)
            cpus = cpus_per_worker(nodes, num_workers=size, use_gpu=use_gpu)
            wait_for_resources(self._sizes.fewest, self._needs, stop_requested=lambda: stop.count > 0)
            if cpus:
                if len(self._sizes.allowed) > 1:
                    logger.info(f"starts {size} workers ({self._sizes.fewest} to {self._sizes.allowed[-1]} will do)")
                return size, threads or cpus
            is_crowded = False  # resources came free meanwhile


class _Generation:
    """The `num_workers` workers of a task, each with `resources`, from their start until all have ended."""

    def __init__(
        self, task: Task, *, num_workers: int, resources: dict[str, float], settings: LauncherSettings
    ) -> None:
        self._task, self._num_workers, self._resources, self._settings = task, num_workers, resources, settings
        self._coordinator = on_this_node(Coordinator, max_concurrency=100_000)
        self._status = Status()
        self._error: Exception | None = None
        """The error of Ray Train."""

    def run(self, stop: StopRequests, resize: ResizeMonitor) -> list[Failure] | None:
        """Runs the workers until they have ended; returns their failures, or None if the resources were not free."""
        ended: Failure | None = None
        try:
            with lasting_folder("workers", secrets.token_hex(4)) as folder:
                fit = threading.Thread(target=self._fit, args=(str(folder),), name="dpkd-ray-train", daemon=True)
                fit.start()  # in a thread: this one handles signals and output
                try:
                    ended = self._watch(fit, stop, resize)
                except RayActorError as error:
                    cause = cause_of_death(error)
                    ended = Failure(-1, f"the actor in which driver and workers meet was lost: {cause}")
                except GetTimeoutError:
                    late = late_start(self._settings.start_timeout_s)
                    ended = Failure(-1, f"the actor in which driver and workers meet was {late}")
                while fit.is_alive():
                    kill_actors(CONTROLLER)  # its workers end too
                    fit.join(POLL_S)
        finally:
            ray.kill(self._coordinator)  # otherwise a traceback that holds it keeps it alive
        return self._failures(ended)

    def _fit(self, folder: str) -> None:
        # waiting threads must not spin, as on one machine; torch reads it once, at its import
        variables = {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}
        config = {"task": self._task, "coordinator": self._coordinator, "folder": str(Path.cwd())}
        trainer = TorchTrainer(
            _enter,
            train_loop_config=config | {"threads": self._settings.threads},
            scaling_config=ScalingConfig(
                num_workers=self._num_workers, use_gpu="GPU" in self._resources, resources_per_worker=self._resources
            ),
            run_config=RunConfig(  # type: ignore[call-arg]  # has the types of version 1
                name=uuid.uuid4().hex,
                storage_path=folder,
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),  # type: ignore[call-arg]
                worker_runtime_env={"env_vars": variables},
            ),
        )
        try:
            trainer.fit()
        except Exception as error:  # noqa: BLE001 (`_failures` reads it)
            self._error = error

    def _watch(self, fit: threading.Thread, stop: StopRequests, resize: ResizeMonitor) -> Failure | None:
        """Shows the workers' output and sends them stop requests, until they have ended.

        Returns a failure earlier if they do not start or end in time.
        """
        clock, starting_s, stopping_s = RunClock(POLL_S), 0.0, 0.0
        start_timeout_s, grace_s = self._settings.start_timeout_s, self._settings.stop_grace_s
        while True:
            is_over = not fit.is_alive()
            self._status = ray.get(self._coordinator.status.remote(), timeout=start_timeout_s)
            with safe_output():
                sys.stdout.write(self._status.output)
                sys.stdout.flush()
            if is_over:
                return None
            if not stop.count:
                resize.check(set(self._status.node_of.values()))
            is_stopping = stop.count > 0 or bool(resize.cause)
            if is_stopping and not stopping_s:
                self._coordinator.stop.remote()
            fit.join(POLL_S)
            passed_s = clock.passed_s()
            starting_s += passed_s
            stopping_s += passed_s if is_stopping else 0.0
            late = set(range(self._num_workers)) - set(self._status.node_of)
            if late and starting_s > start_timeout_s:
                return Failure(min(late), late_start(start_timeout_s))
            if stop.count > 1:
                return Failure(-1, "ended at a second Ctrl-C")
            if stopping_s > grace_s:
                return Failure(-1, f"not done {grace_s:.0f} s after they were asked to stop")

    def _failures(self, ended: Failure | None) -> list[Failure] | None:
        """The failures that workers reported, and the deaths of workers without a report, which count as earlier."""
        reported, error = self._status.failures, self._error
        if isinstance(error, ControllerError) and isinstance(error.controller_failure, WorkerGroupStartupTimeoutError):
            return None
        if len(self._status.done) == self._num_workers:
            return reported
        if ended is not None:
            return reported or [ended]
        if error is None:
            return reported
        if not isinstance(error, WorkerGroupError):
            return [Failure(-1, f"Ray Train failed: {error}"), *reported]
        first_s = min((failure.time_s for failure in reported), default=time.time())
        ranks = {failure.rank for failure in reported} | self._status.done
        deaths = [
            Failure(rank, f"died ({cause_of_death(death)})", time_s=first_s)
            for rank, death in error.worker_failures.items()
            if rank not in ranks
        ]
        return deaths + reported


def _enter(config: dict[str, Any]) -> None:
    """Runs the `task` of the config as the rank from Ray Train, in a thread of Ray."""
    task, coordinator = config["task"], config["coordinator"]
    enter_folder(config["folder"])
    if config["threads"] is not None:
        torch.set_num_threads(config["threads"])
    rank = int(os.environ["RANK"])
    ray.get(coordinator.enter.remote(rank, ray.get_runtime_context().get_node_id()))
    threading.Thread(target=_pass_on_stop, args=(coordinator,), daemon=True).start()
    output = Output(coordinator)
    with contextlib.redirect_stdout(output) if rank == 0 else contextlib.nullcontext():
        try:
            with watched(task.order, rank=rank):
                task.work(task.argument)
                ray.get(coordinator.done.remote(rank))
        except Exception as error:  # the driver gets it too
            failure = Failure.of_error(rank, error)
            ray.get(coordinator.fail.remote(failure))
            if failure.symptom:  # after an error Ray Train ends all workers: the cause must be reported first
                time.sleep(CAUSE_PATIENCE_S)
            raise
        finally:
            output.close()


def _pass_on_stop(coordinator: Any) -> None:
    """Waits for the stop request; ends this process at once if the coordinator is lost."""
    try:
        ray.get(coordinator.wait_for_stop.remote())
    except RayActorError:
        os._exit(1)
    world.request_stop()
