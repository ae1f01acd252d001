"""The session of a training worker: it joins its peers, then runs the stages that are not done, in order."""

from contextlib import nullcontext
from typing import Any

import torch

from dpkd.backends.engines import engine_kind
from dpkd.data.stream import load_ahead
from dpkd.engine.world import join
from dpkd.launch.heartbeat import heartbeat
from dpkd.log import logger
from dpkd.settings import parse_settings
from dpkd.stages.check_data import check_splits
from dpkd.stages.evaluate import evaluate
from dpkd.stages.export import export
from dpkd.stages.plan import check_dataset, left_to_do, left_trainings, recorded, training_stages
from dpkd.stages.run import Run
from dpkd.stages.training import distill, teach, train_baseline


def run_session(tree: dict[str, Any], stages: list[str], attempt: int | None) -> None:
    """See `dpkd.stages.worker.train_stages`."""
    settings = parse_settings(tree, origin="settings of the run")
    if settings.data.loader.workers:
        load_ahead()
    world = join(timeout_s=settings.launcher.peer_timeout_s)
    try:
        _run_stages(Run.open(settings, world, attempt=attempt), stages)
    except Exception:
        if world.size == 1:  # otherwise peers would fail at the closed connection before this error is reported
            world.leave()
        raise
    world.leave()


def _run_stages(run: Run, stages: list[str]) -> None:
    settings, world, trained = run.settings, run.world, training_stages(run.settings)
    if settings.launcher.threads is not None:
        torch.set_num_threads(settings.launcher.threads)
    if world.rank == 0:
        engines = sorted({engine_kind(network.engine, world=world) for network in settings.networks.values()})
        workers = f"{world.size} on {world.device.type}, {torch.get_num_threads()} threads each"
        logger.info(f"  workers   {workers}, engine {' and '.join(engines)}")
    check_dataset(run.dataset, settings, stages)
    place = f"the readable samples of {run.dataset.url}"
    check_splits(
        settings, run.dataset.manifest.classes, run.counts, place=place, trainings=left_trainings(settings, stages)
    )
    # the driver has checked the files of earlier stages; `stages` are those that were not done
    for stage in world.broadcast(left_to_do(run.folder, settings, stages) if world.rank == 0 else []):
        with recorded(stage, run.folder, settings) if world.rank == 0 else nullcontext():
            heartbeat(stage)
            if stage == "distill":
                distill(run)
            elif stage in trained and trained[stage].kind == "teach":
                teach(run, trained[stage].name, stage=stage)
            elif stage in trained:
                train_baseline(run, trained[stage].name, stage=stage)
            elif stage == "evaluate":
                evaluate(run)
            elif world.rank == 0:
                export(run)
            world.barrier()
