"""Picks the pool and the gang that the settings name: this machine's, or the Ray cluster's.

Imports stand inside the functions: pool workers load the driver's modules too, and none should wait for torch or Ray.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpkd.launch.forking import load_ahead
from dpkd.launch.pool import Accelerator, LocalPool, Pool
from dpkd.launch.settings import LauncherSettings
from dpkd.launch.watchdog import WatchOrder
from dpkd.launch.worker_group import Gang
from dpkd.launch.world_size import Sizes


def launcher_kind(settings: LauncherSettings) -> str:
    """`auto` is Ray in a process that a Ray job started, and local elsewhere."""
    if settings.kind != "auto":
        return settings.kind
    return "ray" if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ else "local"


def make_pool(settings: LauncherSettings, *, hangs: Path) -> Pool:
    """Processes for packing and preparing: `launcher.pool_workers`, else one a core; reports of hangs go to `hangs`."""
    order = WatchOrder.begin(hangs, hang_timeout_s=settings.hang_timeout_s)
    if launcher_kind(settings) == "local":
        return LocalPool(settings.pool_workers or os.cpu_count() or 1, order=order)
    from dpkd.backends.ray_pool import RayPool  # noqa: PLC0415

    return RayPool(settings.pool_workers, order=order)


def make_accelerator(settings: LauncherSettings, *, hangs: Path) -> Accelerator | None:
    """Processes for priors that run on a GPU, one a GPU of this machine or of the Ray cluster; none without a GPU.

    On Ray a worker takes a GPU and no CPU, so that it comes up however many CPUs the other pool holds.
    """
    order = WatchOrder.begin(hangs, hang_timeout_s=settings.hang_timeout_s)
    if launcher_kind(settings) == "local":
        devices = _local_gpus()
        if not devices:
            return None
        environments = [{"CUDA_VISIBLE_DEVICES": device} for device in devices]
        return Accelerator(LocalPool(len(devices), environments=environments, order=order), device="cuda")
    from dpkd.backends.ray_pool import RayPool  # noqa: PLC0415
    from dpkd.backends.ray_session import connect, node_gpus  # noqa: PLC0415

    connect()
    return Accelerator(RayPool(gpus_per_worker=1, order=order), device="cuda") if any(node_gpus()) else None


def _local_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch  # noqa: PLC0415

    if not torch.cuda.is_available():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]


def make_gang(settings: LauncherSettings, *, sizes: Sequence[int] = (), module: str) -> Gang:
    """Processes for training, as many of the numbers `sizes` as there is room for; none gives one a GPU, else one.

    `module` holds what they are to run; those of this machine load it from here on.
    """
    options: dict[str, Any] = settings.model_dump(include={"max_restarts", "threads", "stop_grace_s", "hang_timeout_s"})
    chosen = Sizes(tuple(sizes), settings.grow_after_s) if sizes else None
    if launcher_kind(settings) == "local":
        load_ahead("dpkd.backends.local_gang", module)
        from dpkd.backends.local_gang import LocalGang, room  # noqa: PLC0415

        if chosen is None:
            return LocalGang(**options)
        here = room()
        return LocalGang(chosen.choose([here], threads=settings.threads, use_gpu=here.gpus > 0), **options)
    from dpkd.backends.ray_gang import RayGang  # noqa: PLC0415

    return RayGang(chosen, **options)
