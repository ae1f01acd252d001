"""Creates the pool and the worker group of the settings, on this machine or on the Ray cluster.

Imports are inside the functions, because pool workers load this module too and must not wait for torch or Ray.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dpkd.backends.local_pool import LocalPool
from dpkd.errors import UserError
from dpkd.launch.forking import load_ahead
from dpkd.launch.pool import Accelerator, Pool
from dpkd.launch.settings import LauncherSettings
from dpkd.launch.watchdog import WatchOrder
from dpkd.launch.worker_group import WorkerGroup
from dpkd.launch.world_size import NodeResources, WorldSizeRange

if TYPE_CHECKING:
    from dpkd.backends.env_workers import EnvWorkers


def launcher_kind(settings: LauncherSettings) -> str:
    """The kind of launcher; `auto` is Ray inside a Ray job, `env` under torchrun, and local otherwise."""
    if settings.kind != "auto":
        return settings.kind
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return "ray"
    return "env" if "TORCHELASTIC_RUN_ID" in os.environ else "local"


def machine(settings: LauncherSettings) -> NodeResources:
    """The CPUs and GPUs that a run may use, of this machine or of all nodes of the Ray cluster."""
    if launcher_kind(settings) != "ray":
        from dpkd.backends.local_workers import node_resources as resources_here  # noqa: PLC0415

        return resources_here()
    from dpkd.backends.ray_cluster import connect, node_resources  # noqa: PLC0415

    connect()
    nodes = node_resources()
    return NodeResources(cpus=sum(node.cpus for node in nodes), gpus=sum(node.gpus for node in nodes))


def make_pool(settings: LauncherSettings, *, hangs: Path) -> Pool:
    """The pool for packing and preparing, of `launcher.pool_workers` or one per core; reports hangs to `hangs`."""
    order = WatchOrder.begin(hangs, hang_timeout_s=settings.hang_timeout_s)
    if launcher_kind(settings) != "ray":
        num_workers = settings.pool_workers or os.cpu_count() or 1
        return LocalPool(num_workers, order=order, start_timeout_s=settings.start_timeout_s)
    from dpkd.backends.ray_pool import RayPool  # noqa: PLC0415

    return RayPool(settings.pool_workers, order=order)


def make_accelerator(settings: LauncherSettings, *, hangs: Path) -> Accelerator | None:
    """The pool for priors on GPUs, one worker per GPU of this machine or of the Ray cluster; None without a GPU.

    On Ray a worker uses a GPU and no CPU, so that it starts even if the other pool holds all CPUs.
    """
    order = WatchOrder.begin(hangs, hang_timeout_s=settings.hang_timeout_s)
    if launcher_kind(settings) != "ray":
        import torch  # noqa: PLC0415

        if not torch.cuda.is_available():
            return None
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]
        environments = [{"CUDA_VISIBLE_DEVICES": device} for device in devices]
        pool = LocalPool(len(devices), environments=environments, order=order, start_timeout_s=settings.start_timeout_s)
        return pool, "cuda"
    from dpkd.backends.ray_cluster import connect, living_nodes  # noqa: PLC0415
    from dpkd.backends.ray_pool import RayPool  # noqa: PLC0415

    connect()
    if not any(node.get("GPU", 0) for node in living_nodes()):
        return None
    return RayPool(resource="GPU", order=order), "cuda"


def make_worker_group(settings: LauncherSettings, *, sizes: Sequence[int] = (), module: str) -> WorkerGroup:
    """The training workers, the largest number among `sizes` that fits; without sizes one per GPU, or one.

    `module` holds their work; on this machine their fork server starts to load it. Raises `UserError` if this machine
    has GPUs, but fewer than workers.
    """
    chosen = WorldSizeRange(tuple(sizes), settings.grow_after_s) if sizes else None
    if launcher_kind(settings) == "local":
        load_ahead("dpkd.backends.local_workers", module)
        from dpkd.backends.local_workers import LocalWorkers, node_resources  # noqa: PLC0415

        node, num_workers = node_resources(), None
        if chosen is not None:
            num_workers = chosen.choose([node], threads=settings.threads, use_gpu=node.gpus > 0)
            if 0 < node.gpus < num_workers:
                raise UserError(f"launcher.workers={num_workers}, and this machine has {node.gpus} GPUs: lower it")
        return LocalWorkers(num_workers, settings, module=module)
    from dpkd.backends.ray_workers import RayWorkers  # noqa: PLC0415

    return RayWorkers(chosen, settings)


def join_started_workers(settings: LauncherSettings) -> "EnvWorkers | None":
    """The workers that torchrun or srun has started, of which this process is one; None with another launcher."""
    if launcher_kind(settings) != "env":
        if "TORCHELASTIC_RUN_ID" in os.environ and os.environ["WORLD_SIZE"] != "1":
            raise UserError(f"launcher.kind={settings.kind}: each process of torchrun would be a run; remove the key")
        return None
    from dpkd.backends.env_workers import EnvWorkers  # noqa: PLC0415

    return EnvWorkers(settings)
