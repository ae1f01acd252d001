"""What a training worker does: joins its peers, then runs the stages that are left, in order."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch

from dpkd.backends.engines import engine_kind, make_engine
from dpkd.data.stream import load_ahead
from dpkd.engine.world import World, join
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
"""Shortest time that a rank waits for its peers; the watchdog ends those that are behind before that."""


def train_stages(argument: tuple[dict[str, Any], list[str], int | None]) -> None:
    """Runs the training stages in this worker: `argument` holds the settings as plain values, stages, and the attempt.

    After a fault it runs again: stages that an earlier attempt finished are done, and one that it began goes on.
    """
    tree, stages, attempt = argument
    settings = parse_settings(tree, origin="settings of the run")
    if settings.data.loader.workers:
        load_ahead()
    peers = join(timeout_s=max(PATIENCE_S, 2 * SLOW * (settings.launcher.hang_timeout_s or 0.0)))
    try:
        _run_stages(open_run(settings, peers, attempt=attempt), stages)
    except Exception:
        if peers.size == 1:  # else peers would fail at the closed connection before this error is reported
            peers.leave()
        raise
    peers.leave()


def open_run(settings: Settings, peers: World, *, attempt: int | None = None) -> Run:
    """The run of these settings as this worker sees it."""
    folder = RunFolder(settings.run.dir, checkpoints=settings.run.checkpoints, attempt=attempt)
    return Run(folder=folder, world=peers, settings=settings, make_engine=make_engine)


def _run_stages(run: Run, stages: list[str]) -> None:
    settings, world, teaching = run.settings, run.world, teaching_stages(run.settings)
    if settings.launcher.threads is not None:
        torch.set_num_threads(settings.launcher.threads)
    if world.rank == 0:
        threads, engines = torch.get_num_threads(), {engine_kind(net.engine) for net in settings.networks.values()}
        logger.info(
            f"  workers   {world.size} on {world.device.type}, {threads} thread{'s' if threads > 1 else ''} each, "
            f"{' and '.join(sorted(engines))} engine{'s' if len(engines) > 1 else ''}"
        )
    refuse_unknown_classes(run.dataset, settings)
    refuse_small_splits(run)
    # the driver has checked the files of earlier stages, and passed on those stages that are left
    for stage in world.broadcast(left_to_do(run.folder, settings, stages) if world.rank == 0 else []):
        with _recorded(stage, run) if world.rank == 0 else nullcontext():
            heartbeat(stage)
            if stage in teaching:
                teach(run, teaching[stage], stage=stage)
            elif stage == "distill":
                distill(run)
            elif stage == "evaluate":
                evaluate(run)
            elif world.rank == 0:
                export(run)
            world.barrier()


@contextmanager
def _recorded(stage: str, run: Run) -> Iterator[None]:
    run.events.write("stage_began", stage=stage)
    outputs = partial(stage_outputs, stage, run.settings)
    with run.folder.running(stage, stage_inputs(stage, run.settings), makes=outputs):
        yield
    run.events.write("stage_ended", stage=stage)
