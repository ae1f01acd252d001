"""The connection of this process to its Ray cluster, and what the pool and the gang need to know of it."""

import contextlib
import logging
import math
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray._private.state import actors, available_resources_per_node
from ray._raylet import PlacementGroupID
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dpkd.errors import UserError
from dpkd.launch.world_size import Room

ANSWER_TIMEOUT_S = 2.0


def connect() -> None:
    """Joins the running cluster, once; Ray's own messages stay in its log files.

    Raises `UserError` where there is no cluster, or its token is missing.
    """
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS", "auto")
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ray.exceptions.AuthenticationError) as error:
        raise UserError(
            f"launcher.kind=ray: no Ray cluster answers at {address!r} ({error}). Submit the command with "
            "`ray job submit -- …`, start a cluster with `ray start --head`, or set launcher.kind=local. A cluster "
            "with token authentication wants RAY_AUTH_MODE=token and its token here too."
        ) from error


def on_this_node(actor: type, *, max_concurrency: int) -> Any:
    """A handle to a new actor of the class, on the node of this process, taking no CPU."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options: dict[str, Any] = {"num_cpus": 0, "max_concurrency": max_concurrency, "scheduling_strategy": here}
    return ray.remote(**options)(actor).remote()


def kill_actors(class_name: str) -> None:
    """Kills the actors of this class that this process has made, and with them those that they own."""
    core: Any = ray._private.worker.global_worker  # noqa: SLF001  as `ray.kill` does, for actors without a handle
    for actor, told in actors(job_id=ray.JobID.from_hex(ray.get_runtime_context().get_job_id())).items():
        if told["ActorClassName"] == class_name and told["State"] != "DEAD":
            core.core_worker.kill_actor(ray.ActorID.from_hex(actor), True)


def free_placement_groups() -> None:
    """Gives back the room that this job holds in placement groups, whoever asked for it."""
    job: str = ray.get_runtime_context().get_job_id()
    for group, told in placement_group_table().items():
        if group.endswith(job) and told["state"] != "REMOVED":  # an id ends with that of its job
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))


def rooms(*, free: bool = False) -> list[Room]:
    """What each node has that answers and stays, or has free: Ray takes its time to notice that one is gone."""
    draining = draining_nodes()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]
    with ThreadPoolExecutor(max_workers=32) as threads:
        answering = list(threads.map(_answers, nodes))
    staying = [node for node, answers in zip(nodes, answering, strict=True) if answers]
    left = available_resources_per_node() if free else {node["NodeID"]: node["Resources"] for node in staying}
    resources = [left.get(node["NodeID"], {}) for node in staying]
    return [Room(cpus=int(each.get("CPU", 0)), gpus=int(each.get("GPU", 0))) for each in resources]


def _answers(node: dict[str, Any]) -> bool:
    """Whether the node's raylet listens."""
    try:
        with socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=ANSWER_TIMEOUT_S):
            return True
    except OSError:
        return False


def draining_nodes() -> dict[str, float]:
    """The nodes that are about to leave, by id, each with the seconds it has left; one question to the head."""
    left = ray._private.state.state.get_draining_nodes()  # noqa: SLF001  as Ray Train and Ray Data ask
    now_s = time.time()
    return {node: deadline_ms / 1000 - now_s if deadline_ms else math.inf for node, deadline_ms in left.items()}


def node_gpus() -> list[int]:
    """The GPUs of each node that is alive."""
    return [int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]]


def enter_folder(folder: str) -> None:
    """Goes to the driver's working folder where this node has it, so that relative paths mean the same."""
    with contextlib.suppress(OSError):
        os.chdir(folder)
