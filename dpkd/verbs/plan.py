"""Shows the stages that a run would do, and checks what can be known before any work."""

import os

from dpkd.run.folder import RunFolder
from dpkd.settings import Settings
from dpkd.stages.origin import with_origin
from dpkd.stages.plan import dataset_url, plan_run, stages_of


def plan(settings: Settings, *, fast: bool = False) -> None:
    """Logs each stage and its status.

    Unless `fast`, it lists the source, if the images are not packed, and builds every network. Raises `UserError` with
    the key, its value and the way out.
    """
    folder = RunFolder(settings.run.dir)
    settings = with_origin(settings, folder)
    left = plan_run(settings, folder, stages_of(settings))
    if fast:
        return
    # not at the top: `--fast` loads neither torch nor pyarrow
    from dpkd.backends.local_pool import LocalPool  # noqa: PLC0415
    from dpkd.data.sources import find  # noqa: PLC0415
    from dpkd.stages.check_networks import check_networks  # noqa: PLC0415
    from dpkd.stages.pack import check_plan, plan_shards  # noqa: PLC0415

    if "pack" in left and settings.data.source is not None:
        contents = find(settings.data.source, pool=LocalPool(settings.launcher.pool_workers or os.cpu_count() or 1))
        url = dataset_url(folder, settings.data)
        check_plan(
            plan_shards(contents, settings.data, seed=settings.run.seed, destination=url), settings=settings, left=left
        )
    check_networks(settings, left)
