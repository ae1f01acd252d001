"""The connection of this process to its Ray cluster, and what the pool and the gang need to know of it."""

import contextlib
import logging
import math
import os
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dpkd.errors import UserError


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


def node_cpus() -> list[int]:
    """The CPUs of each node that is alive and stays."""
    draining = draining_nodes()
    staying = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]
    return [int(node["Resources"].get("CPU", 0)) for node in staying]


def draining_nodes() -> dict[str, float]:
    """The nodes that are about to leave, by id, each with the seconds it has left; one question to the head."""
    left = ray._private.state.state.get_draining_nodes()  # noqa: SLF001  as Ray Train and Ray Data ask
    now_s = time.time()
    return {node: deadline_ms / 1000 - now_s if deadline_ms else math.inf for node, deadline_ms in left.items()}


def node_gpus() -> list[int]:
    """The GPUs of each node that is alive."""
    return [int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]]


def cpus_per_worker(cpus: Sequence[int], *, num_workers: int) -> int:
    """The most CPUs that each of `num_workers` can have at once on nodes with `cpus`; 0 where they do not fit."""
    for share in range(max(cpus, default=0), 0, -1):
        if sum(node // share for node in cpus) >= num_workers:
            return share
    return 0


def enter(folder: str) -> None:
    """Goes to the driver's working folder where this node has it, so that relative paths mean the same."""
    with contextlib.suppress(OSError):
        os.chdir(folder)
