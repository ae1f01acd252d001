"""What a training worker does: joins its peers, then runs the stages that are left, in order."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch

from dpkd.backends.engines import engine_kind, make_engine
from dpkd.data.stream import load_ahead
from dpkd.engine import world
from dpkd.launch.heartbeat import SLOW, heartbeat
from dpkd.log import logger
from dpkd.run.folder import RunFolder
from dpkd.settings import Settings, parse_settings
from dpkd.stages.attributes import refuse_unknown_classes
from dpkd.stages.distill import distill
from dpkd.stages.evaluate import evaluate, refuse_small_splits
from dpkd.stages.export import export
from dpkd.stages.plan import left_to_do, stage_inputs, stage_outputs, teaching_stages
from dpkd.stages.run import Run
from dpkd.stages.teach import teach

PATIENCE_S = 1800.0
"""How long a rank waits for its peers at least; the watchdog, which ends those that are behind, comes first."""


def train_stages(argument: tuple[dict[str, Any], list[str], int | None]) -> None:
    """Runs the training stages in this worker: `argument` holds the settings as plain values, stages, and the attempt.

    Also the way back after a fault: what the earlier attempt finished is done, what it began goes on.
    """
    tree, stages, attempt = argument
    settings = parse_settings(tree, origin="settings of the run")
    if settings.data.loader.workers:
        load_ahead()
    peers = world.join(timeout_s=max(PATIENCE_S, 2 * SLOW * (settings.launcher.hang_timeout_s or 0.0)))
    try:
        _run_stages(open_run(settings, peers, attempt=attempt), settings, stages)
    except Exception:  # passed on
        if peers.size == 1:  # peers would fail at the closed connection before this error is told
            peers.leave()
        raise
    peers.leave()


def open_run(settings: Settings, peers: world.World, *, attempt: int | None = None) -> Run:
    """The run of these settings as this worker sees it."""
    folder = RunFolder(settings.run.dir, checkpoints=settings.run.checkpoints, attempt=attempt)
    return Run(folder=folder, world=peers, settings=settings, make_engine=make_engine)


def _run_stages(run: Run, settings: Settings, stages: list[str]) -> None:
    peers = run.world
    _share_cores(settings, peers)
    refuse_unknown_classes(run.dataset, settings)
    refuse_small_splits(run)
    # the driver has checked the files of earlier stages, and passed on those stages that are left
    left = peers.broadcast(left_to_do(run.folder, settings, stages) if peers.rank == 0 else [])
    for stage in left:
        with _recorded(stage, run, settings) if peers.rank == 0 else nullcontext():
            heartbeat(stage)
            _run_stage(stage, run)
            peers.barrier()


@contextmanager
def _recorded(stage: str, run: Run, settings: Settings) -> Iterator[None]:
    run.events.write("stage_began", stage=stage)
    outputs = partial(stage_outputs, stage, settings)
    with run.folder.running(stage, stage_inputs(stage, settings), makes=outputs):
        yield
    run.events.write("stage_ended", stage=stage)


def _run_stage(stage: str, run: Run) -> None:
    teaching = teaching_stages(run.settings)
    if stage in teaching:
        teach(run, teaching[stage], stage=stage)
    elif stage == "distill":
        distill(run)
    elif stage == "evaluate":
        evaluate(run)
    elif run.world.rank == 0:
        export(run)


def _share_cores(settings: Settings, peers: world.World) -> None:
    if settings.launcher.threads is not None:
        torch.set_num_threads(settings.launcher.threads)
    if peers.rank == 0:
        threads = torch.get_num_threads()
        chosen = [network.engine for network in settings.networks.values()]
        engines = {engine_kind(each) for each in chosen}
        logger.info(
            f"  workers   {peers.size} on {peers.device.type}, {threads} thread{'s' if threads > 1 else ''} each, "
            f"{' and '.join(sorted(engines))} engine{'s' if len(engines) > 1 else ''}"
        )
