"""The driver of a run: the stages that are not done, in order, then the summary."""

import time
from collections.abc import Sequence
from functools import partial

from dpkd.backends.factory import join_started_workers, make_accelerator, make_pool, make_worker_group
from dpkd.data.shards import Dataset
from dpkd.launch.signals import block_stop_signals
from dpkd.launch.worker_group import WorkerGroup
from dpkd.log import Progress, duration, logger
from dpkd.priors.base import accelerated
from dpkd.report.quarantine import Quarantine
from dpkd.report.summary import figure_or_none, final_words, write_summary
from dpkd.run.attempt import attempt_at, write_provenance
from dpkd.run.folder import RunFolder
from dpkd.settings import Settings, parse_settings
from dpkd.stages import STAGES
from dpkd.stages.pack import check_plan, pack
from dpkd.stages.plan import POOL_STAGES, check_dataset, dataset_url, plan_run, recorded, stages_of, with_origin
from dpkd.stages.prepare import prepare
from dpkd.stages.report import REPORT_NAME, write_report
from dpkd.stages.worker import SESSION, check_in_child, train_stages


def run(settings: Settings, *, stages: Sequence[str] = STAGES, chosen: str | None = None) -> None:
    """Runs the stages that are not done, in order, and prints the summary.

    `chosen` is the text of chosen settings, which is kept in the run folder. Raises `UserError`, before any work, for
    settings that contradict the run folder. Of several processes that torchrun has started, each calls it.
    """
    started = join_started_workers(settings.launcher)
    if started is None:
        drive(settings, stages=stages, chosen=chosen)
        return
    with started:
        if not started.is_driver:
            started.follow()
            return
        tree = settings.model_dump(mode="json")
        tree["launcher"]["workers"] = started.size
        settings = parse_settings(tree, origin=f"WORLD_SIZE={started.size}")
        drive(settings, stages=stages, chosen=chosen, workers=started)


def drive(
    settings: Settings, *, stages: Sequence[str], chosen: str | None = None, workers: WorkerGroup | None = None
) -> None:
    """Runs the stages as the only driver; without `workers` it starts those that the settings describe."""
    began = time.monotonic()
    folder = RunFolder(settings.run.dir, checkpoints=settings.run.checkpoints)
    settings = with_origin(settings, folder)
    stages = stages_of(settings, stages)
    left = plan_run(settings, folder, stages)
    training = [stage for stage in left if stage not in POOL_STAGES]
    if left:
        with block_stop_signals():  # starts Python's resource tracker, which a signal to the group must not end
            pass
    if training:
        workers = workers or make_worker_group(settings.launcher, sizes=settings.world_sizes, module=SESSION)
        check_in_child(settings.model_dump(mode="json"), left)
    if left:
        write_provenance(folder, settings.model_dump(mode="json"), chosen=chosen)
        folder = folder.acquire()
        folder.reopen(left)  # a stage whose files are damaged is recorded as done, and workers skip those
        with attempt_at(folder, left) as supervision:
            run_pool_stages(settings, folder, left)
            if workers is not None and training:
                argument = (settings.model_dump(mode="json"), training, folder.attempt)
                workers.run(train_stages, argument, supervision=supervision)
    summary = write_summary(folder.path)
    figure_or_none(REPORT_NAME, lambda: write_report(settings, summary))
    logger.info(final_words(summary))
    logger.info(f"{'done' if left else 'all was done before; nothing to do'}, {duration(time.monotonic() - began)}")


def run_pool_stages(settings: Settings, folder: RunFolder, left: Sequence[str]) -> None:
    """Runs those of the stages pack and prepare that are `left`."""
    if not {*left} & {*POOL_STAGES}:
        return
    data, url, hangs = settings.data, dataset_url(folder, settings.data), folder.hangs
    pool = make_pool(settings.launcher, hangs=hangs)
    quarantine = Quarantine(folder.quarantine, limit=data.bad_limit)
    if "pack" in left:
        # without a source the shards exist already
        with recorded("pack", folder, settings), Progress("pack", 0, shown=data.source is not None) as progress:
            pack(
                data,
                url,
                seed=settings.run.seed,
                pool=pool,
                quarantine=quarantine,
                progress=progress.reach,
                check=partial(check_plan, settings=settings, left=left),
            )
    if "prepare" in left:
        with recorded("prepare", folder, settings), Progress("prepare", 0) as progress:
            dataset = Dataset.open(url)
            check_dataset(dataset, settings, left)
            # only if a prior can use an accelerator: otherwise the driver needs no torch to look for GPUs
            accelerate = accelerated(settings.prepare.chosen)
            prepare(
                dataset,
                settings.prepare,
                pool=pool,
                accelerator=make_accelerator(settings.launcher, hangs=hangs) if accelerate else None,
                quarantine=quarantine,
                progress=progress.reach,
            )
