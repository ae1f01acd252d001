"""The Ray cluster of this process: the connection to it, its nodes, and resources for the workers of a session.

Resources are requested as a placement group, which reserves them all together and shows the request to an autoscaler.
"""

import contextlib
import logging
import math
import os
import re
import socket
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Self

import ray
from ray._private.state import actors, available_resources_per_node
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dpkd.errors import StopRequested, UserError
from dpkd.launch.world_size import NodeResources, WorldSizeRange
from dpkd.log import logger

ANSWER_TIMEOUT_S = 2.0
CHECK_S = 3.0
POLL_S = 0.2
QUIET_S = 10.0
"""Seconds of waiting before a message to the user."""


def connect() -> None:
    """Joins the running cluster, once; the messages of Ray go only to its log files.

    Raises `UserError` if there is no cluster, or its token is missing.
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
            "with token authentication needs RAY_AUTH_MODE=token and its token on this machine too."
        ) from error


def on_this_node(actor: type, *, max_concurrency: int) -> Any:
    """A handle to a new actor of the class, on the node of this process, without a CPU."""
    strategy = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options: dict[str, Any] = {"num_cpus": 0, "max_concurrency": max_concurrency, "scheduling_strategy": strategy}
    return ray.remote(**options)(actor).remote()


def kill_actors(class_name: str) -> None:
    """Kills the actors of this class in this job, and the actors that they own."""
    core: Any = ray._private.worker.global_worker  # noqa: SLF001 (`ray.kill` does the same, but needs a handle)
    for actor, facts in actors(job_id=ray.JobID.from_hex(ray.get_runtime_context().get_job_id())).items():
        if facts["ActorClassName"] == class_name and facts["State"] != "DEAD":
            core.core_worker.kill_actor(ray.ActorID.from_hex(actor), True)


def node_resources(*, free: bool = False) -> list[NodeResources]:
    """The resources of every node that answers and is not draining, or its free resources."""
    all_of = answering_nodes()
    left = available_resources_per_node() if free else all_of
    nodes = [left.get(node, {}) for node in all_of.keys() - draining_nodes()]
    return [NodeResources(cpus=int(node.get("CPU", 0)), gpus=int(node.get("GPU", 0))) for node in nodes]


def answering_nodes() -> dict[str, dict[str, float]]:
    """The resources of each node that takes a connection, by its id; Ray lists a lost node as alive for some 15 s."""
    found = {}
    for node in (each for each in ray.nodes() if each["Alive"]):
        place = (node["NodeManagerAddress"], node["NodeManagerPort"])
        with contextlib.suppress(OSError), socket.create_connection(place, ANSWER_TIMEOUT_S):
            found[node["NodeID"]] = node["Resources"]
    return found


def draining_nodes() -> set[str]:
    """The ids of the nodes that are about to leave; one request to the head."""
    return set(ray._private.state.state.get_draining_nodes())  # noqa: SLF001 (Ray Train and Ray Data do the same)


def living_nodes() -> list[dict[str, float]]:
    """The resources of each living node."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def shortage(needs: Mapping[str, float], *, nodes: Sequence[Mapping[str, float]], free: Mapping[str, float]) -> str:
    """A message on missing resources of a worker; `free` are the unused resources of all nodes together."""
    wanted = " and ".join(f"{need:g} {name}" for name, need in needs.items())
    have = " and ".join(
        f"{sum(node.get(name, 0.0) for node in nodes):g} {name}s ({free.get(name, 0.0):g} free)" for name in needs
    )
    return f"waiting for the Ray cluster: a worker needs {wanted}, and its {len(nodes)} nodes have {have}"


def enter_folder(folder: str) -> None:
    """Changes to the driver's working folder if this node has it, so that relative paths have the same meaning."""
    with contextlib.suppress(OSError):
        os.chdir(folder)


def cause_of_death(error: object) -> str:
    """Place and cause of the death of a Ray process, from the long error text of Ray."""
    text = str(error)
    place = re.search(r"node_ip='([^']+)', pid=(\d+)", text)
    reason = next((line for line in text.splitlines() if "because" in line), text.partition("\n")[0])
    return (f"process {place[2]} on {place[1]}: " if place else "") + reason.partition(". ")[0]


def wait_for_resources(num_workers: int, needs: dict[str, float], *, stop_requested: Callable[[], bool]) -> None:
    """Waits until the cluster has `needs` free for each of `num_workers`; raises `StopRequested` on a stop request."""
    group = placement_group([needs] * num_workers)
    quiet_until_s = time.monotonic() + QUIET_S
    try:
        while True:
            is_ready = group.wait(timeout_seconds=POLL_S)
            if stop_requested():
                raise StopRequested("stopped before its workers were started; the last checkpoint is kept")
            if is_ready:
                return
            if time.monotonic() >= quiet_until_s:
                quiet_until_s = math.inf
                missing = shortage(needs, nodes=living_nodes(), free=ray.available_resources())
                logger.info(f"{missing}; {num_workers} are to start (see `ray status`)")
    finally:
        remove_placement_group(group)


class ResizeMonitor:
    """Finds a cause to restart a running generation: a node that leaves, or resources for more workers.

    `cause` is empty until one is found. Use it as a context manager, which releases the resources that it reserved for
    more workers.
    """

    def __init__(self, sizes: WorldSizeRange, *, size: int, needs: dict[str, float]) -> None:
        """`size` is the current number of workers; each uses at least `needs` of a node's resources."""
        self.cause = ""
        self.began_s = 0.0
        more = sizes.above(size)
        self._wanted = [dict(needs)] * (more - size) if more is not None else []
        self._cause_of_growth = f"there is room for {more} workers instead of {size}"
        self._grow_after_s = sizes.grow_after_s
        self._group: PlacementGroup | None = None
        self._checked_s = 0.0
        self._ready_since_s = math.inf

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._group is not None:
            remove_placement_group(self._group)

    def check(self, nodes: Collection[str]) -> None:
        """Checks the cluster, at most every `CHECK_S` seconds; `nodes` are those of started workers."""
        if self.cause or not nodes or time.monotonic() < self._checked_s + CHECK_S:
            return
        self._checked_s = time.monotonic()
        if draining_nodes() & set(nodes):
            self.cause = "a node is about to leave the cluster"
        elif self._wanted:
            if self._group is None:
                self._group = placement_group(self._wanted, strategy="PACK")
            is_ready = self._group.wait(timeout_seconds=0.01)
            self._ready_since_s = min(self._ready_since_s, time.monotonic()) if is_ready else math.inf
            if time.monotonic() >= self._ready_since_s + self._grow_after_s:
                self.cause = self._cause_of_growth
        self.began_s = time.time()
