"""Proves that a run used each sample in the planned order, over all attempts, without the steps rolled back."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from dpkd.data.order import SampleOrder, rank_slice
from dpkd.engine.world import World
from dpkd.errors import UserError
from dpkd.io.checkpoint_store import CheckpointStore
from dpkd.log import logger, show
from dpkd.settings import DistillSettings, TeacherSettings, load_settings
from dpkd.stages.plan import training_stages
from dpkd.stages.run import Run, training_set
from dpkd.stages.training import sample_order
from dpkd.train.divergence import read_skipped
from dpkd.train.sample_log import History, checksum, read_history

NUM_NAMED = 5
"""Number of faulty steps in an error message."""


def audit(folder: str) -> None:
    """Prints the contents of the sample logs of a run, one line per stage that has started.

    Raises `UserError` with the steps that used other samples than the order gives, or that the logs lack though a
    checkpoint or a finished stage covers them.
    """
    path = Path(folder) / "settings.yaml"
    if not path.exists():
        raise UserError(f"{folder}: it has no settings.yaml; give the folder of a run")
    settings = load_settings(path, [])
    run = Run.open(settings, World(rank=0, size=1, local_rank=0, device=torch.device("cpu")))
    table = Table("stage", "steps", "attempts", "rolled back", "skipped", "samples", "times each")
    faults: list[str] = []
    for stage, trained in training_stages(settings).items():
        if run.folder.sample_log(stage).is_dir():
            row, stage_faults = _audit_stage(run, stage, trained.settings)
            table.add_row(stage, *row)
            faults += stage_faults
    if not table.rows:
        raise UserError(f"{folder}: no stage of this run has a sample log; train first, or give another folder")
    show(table)
    if faults:
        more = f"; and {len(faults) - NUM_NAMED:,} more" if len(faults) > NUM_NAMED else ""
        raise UserError(
            f"{folder}: {len(faults):,} steps did not use the samples of the order: {'; '.join(faults[:NUM_NAMED])}"
            f"{more}. Their networks do not fit the settings: keep the folder, and report this error"
        )
    logger.info("every step used exactly the samples of the order, each once")


def _audit_stage(run: Run, stage: str, part: TeacherSettings | DistillSettings) -> tuple[list[str], list[str]]:
    """The cells of a stage's row, and the faults of its steps."""
    networks = part.students.values() if isinstance(part, DistillSettings) else [part]
    objectives = [objective for network in networks for objective in network.objectives]
    samples = training_set(run, part.training, objectives)
    order = sample_order(run, part.training, samples)
    history = read_history(run.folder.sample_log(stage))
    skipped = read_skipped(run.folder.skipped(stage))
    if run.folder.stages().get(stage, {}).get("status") == "done":
        last = part.training.num_steps(samples.num_samples)
    else:  # the newest checkpoint covers these steps
        last = max((saved.step for saved in CheckpointStore(run.folder.checkpoints(stage)).committed()), default=0)
    steps = [step for step in range(last) if step not in skipped]
    faults = judge(history, order, steps)
    used = np.zeros(samples.split.num_samples, np.int64)
    for step in steps:
        if step not in faults:
            np.add.at(used, order.batch(step), 1)
    drawn = np.delete(used, samples.unreadable)
    times = f"{drawn.min()} to {drawn.max()}" if last else ""
    numbers = (last, history.num_attempts, history.num_rolled_back, len(skipped), int(drawn.sum()))
    named = [f"{stage} step {step + 1}: {fault}" for step, fault in faults.items()]
    return [*(f"{number:,}" for number in numbers), times], named


def judge(history: History, order: SampleOrder, steps: Iterable[int]) -> dict[int, str]:
    """The faults of `steps` by step: other samples than those of the order, or missing logs."""
    faults = {}
    for step in steps:
        log = history.steps.get(step)
        if log is None:
            faults[step] = "no attempt has it in its log"
            continue
        used = log.checksums[step]
        layout = {"world_size": log.world_size, "micro_batch_size": log.micro_batch_size}
        expected = [checksum(rank_slice(order.batch(step), rank=rank, **layout)) for rank in range(log.world_size)]
        wrong = [str(rank) for rank, crc in enumerate(expected) if used.get(rank, crc) != crc]
        if wrong:
            faults[step] = f"attempt {log.attempt} used other samples on rank {', '.join(wrong)}"
        elif len(used) < log.world_size:
            faults[step] = f"attempt {log.attempt} has it for some of its ranks only"
    return faults
