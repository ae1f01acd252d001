"""Picks the pool and the gang that the settings name: this machine's, or the Ray cluster's.

Imports stand inside the functions: pool workers load the driver's modules too, and none should wait for torch or Ray.
"""

import os
from typing import Any

from dpkd.gang import Gang
from dpkd.pool import LocalPool, Pool
from dpkd.stages.settings import LauncherSettings


def launcher_kind(settings: LauncherSettings) -> str:
    """`auto` is Ray in a process that a Ray job started, and local elsewhere."""
    if settings.kind != "auto":
        return settings.kind
    return "ray" if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ else "local"


def make_pool(settings: LauncherSettings) -> Pool:
    """Processes for packing and preparing: `launcher.pool_workers`, else one a core."""
    if launcher_kind(settings) == "local":
        return LocalPool(settings.pool_workers or os.cpu_count() or 1)
    from dpkd.backends.ray_pool import RayPool  # noqa: PLC0415

    return RayPool(settings.pool_workers)


def make_gang(settings: LauncherSettings) -> Gang:
    """Processes for training: `launcher.workers`, else one a GPU, else one."""
    options: dict[str, Any] = settings.model_dump(include={"max_restarts", "threads", "stop_grace_s", "hang_timeout_s"})
    if launcher_kind(settings) == "local":
        from dpkd.backends.local_gang import LocalGang  # noqa: PLC0415

        return LocalGang(settings.workers, **options)
    from dpkd.backends.ray_gang import RayGang  # noqa: PLC0415

    return RayGang(settings.workers, **options)
