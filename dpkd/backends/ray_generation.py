"""One generation of workers on a Ray cluster, which Ray Train places, starts and watches.

A small actor on the driver's node, the post, carries what Ray Train does not: the request to stop to the workers, and
their failures and the first one's output to the driver. And Ray Train waits for ever for a worker, or for its own
actor, that hangs before the workers are at work; here it does not.
"""

import os
import re
import secrets
import sys
import threading
import time
import uuid

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from dpkd.backends.ray_post import Look, asked
from dpkd.backends.ray_room import Move
from dpkd.backends.ray_session import free_placement_groups, kill_actors
from dpkd.backends.ray_worker import Task, enter
from dpkd.io.temporary_folder import lasting_folder
from dpkd.launch.heartbeat import SLOW
from dpkd.launch.worker_group import Failure, StopRequests
from dpkd.log import safe_output

CONTROLLER = "TrainController"
"""The actor that leads a generation, of which Ray Train gives no handle."""
POLL_S = 0.3
END_PATIENCE_S = 20.0
"""What Ray Train has to end workers beyond their time of grace."""
DRIVER_SETTINGS = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths of the settings mean the driver's folder
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


class Generation:
    """So many workers of a task, each with its resources; those that were asked to stop end after `grace_s`."""

    def __init__(self, task: Task, *, num_workers: int, resources: dict[str, float], grace_s: float) -> None:
        self._task, self._num_workers, self._resources, self._grace_s = task, num_workers, resources, grace_s
        self._allowance_s = SLOW * task.order.hang_timeout_s if task.order is not None else float("inf")
        self._error: Exception | None = None
        self._ended: Failure | None = None
        """Why it was ended from here."""
        self._told: list[Failure] = []
        self._done: set[int] = set()

    def run(self, stop: StopRequests, move: Move) -> list[Failure]:
        """Runs them until they have ended; returns how they failed, if they did: as they told, or were seen to die."""
        for name, value in DRIVER_SETTINGS.items():
            os.environ.setdefault(name, value)
        with lasting_folder("gang", secrets.token_hex(4)) as folder:
            fit = threading.Thread(target=self._fit, args=(str(folder),), name="dpkd-ray-train", daemon=True)
            fit.start()  # so that this thread stays free for signals and output
            try:
                self._watch(fit, stop, move)
            except (RayActorError, GetTimeoutError) as error:
                self._ended = Failure(-1, f"the actor in which driver and workers meet was lost: {error}")
                ray.kill(self._task.post)
            while fit.is_alive():
                kill_actors(CONTROLLER)  # the workers go with it
                fit.join(POLL_S)
        if self._error is not None:
            free_placement_groups()  # Ray Train's actor for that asks the dashboard, and waits where it does not answer
        return self._deaths() + self._told

    @property
    def found_no_room(self) -> bool:
        """Whether the workers never started because the cluster had no room for them."""
        return isinstance(self._error, ControllerError) and isinstance(
            self._error.controller_failure, WorkerGroupStartupTimeoutError
        )

    def _fit(self, folder: str) -> None:
        use_gpu = "GPU" in self._resources
        trainer = TorchTrainer(
            enter,
            train_loop_config={"task": self._task},
            scaling_config=ScalingConfig(
                num_workers=self._num_workers, use_gpu=use_gpu, resources_per_worker=self._resources
            ),
            run_config=RunConfig(  # type: ignore[call-arg]  # typed as that of version 1
                name=uuid.uuid4().hex,
                storage_path=folder,
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),  # type: ignore[call-arg]
                worker_runtime_env={"env_vars": _worker_variables()},
            ),
        )
        try:
            trainer.fit()
        except Exception as error:  # noqa: BLE001  told by `run`
            self._error = error

    def _watch(self, fit: threading.Thread, stop: StopRequests, move: Move) -> None:
        """Shows the workers' output and passes requests to stop on to them, until they are done.

        Returns early where they do not come to their own watchdogs, or do not end.
        """
        post, passed_on, looked_s = self._task.post, 0, time.monotonic()
        waited_s = stopping_s = ending_s = 0.0
        while True:
            over = not fit.is_alive()
            look: Look = asked(post.look.remote())
            _show(look.output)
            self._done, self._told = look.done, look.failures
            if over:
                return
            if stop.count > passed_on:
                passed_on = stop.count
                asked(post.stop.remote(self._grace_s) if passed_on == 1 else post.end.remote())
            elif not passed_on:
                move.look(set(look.node_of.values()))
            fit.join(POLL_S)
            before_s, looked_s = looked_s, time.monotonic()
            passed_s = min(looked_s - before_s, 1.0)  # a pause of the whole machine counts little
            waited_s += passed_s
            stopping_s += passed_s if passed_on or move.cause else 0.0
            ending_s += passed_s if look.failures or len(look.done) == self._num_workers else 0.0
            late = set(range(self._num_workers)) - set(look.node_of)
            if late and waited_s > self._allowance_s:
                self._ended = Failure(min(late), f"hung: not at work {self._allowance_s:.0f} s after it was started")
            elif stopping_s > self._grace_s + END_PATIENCE_S:
                self._ended = Failure(-1, f"not done {stopping_s:.0f} s after they were asked to stop")
            elif ending_s > END_PATIENCE_S:
                self._ended = Failure(-1, f"not at its end {ending_s:.0f} s after all were done, or one had failed")
            if self._ended is not None:
                return

    def _deaths(self) -> list[Failure]:
        """The failures of workers that did not tell of theirs: they died before the others."""
        if len(self._done) == self._num_workers:
            return []
        if self._ended is not None:
            return [] if self._told else [self._ended]
        if self._error is None:
            return []
        if not isinstance(self._error, WorkerGroupError):
            return [Failure(-1, f"Ray Train failed: {self._error}")]
        first_s = min((failure.time_s for failure in self._told), default=time.time())
        heard = {failure.rank for failure in self._told}
        deaths = {rank: error for rank, error in self._error.worker_failures.items() if rank not in heard}
        return [Failure(rank, f"died ({_gist(error)})", time_s=first_s) for rank, error in deaths.items()]


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


def _show(output: str) -> None:
    with safe_output():
        sys.stdout.write(output)
        sys.stdout.flush()
