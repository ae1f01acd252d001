"""Proves that a run used each sample exactly as the order says, over all its attempts, net of what was rolled back."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table

from dpkd.data.order import SampleOrder
from dpkd.engine.settings import TrainingSettings
from dpkd.engine.world import World
from dpkd.errors import UserError
from dpkd.io.checkpoint_store import CheckpointStore
from dpkd.log import logger, show
from dpkd.objectives.settings import StudentObjective
from dpkd.settings import Settings, load_settings
from dpkd.stages.run import Run, training_set
from dpkd.stages.training import sample_order
from dpkd.stages.worker import open_run
from dpkd.train.divergence import read_skipped
from dpkd.train.sample_log import History, history, read_ledgers

STAGES = ("teach", "distill")
NUM_NAMED = 5
"""Faulty steps that an error names; more are counted."""


def audit(folder: str) -> None:
    """Prints what the ledgers of a run say, a line a stage that has begun.

    Raises `UserError` that names the steps whose samples are not those that the order gives, or that are missing though
    a checkpoint or a finished stage covers them.
    """
    path = Path(folder) / "settings.yaml"
    if not path.exists():
        raise UserError(f"{folder}: no settings.yaml there; give the folder of a run")
    settings = load_settings(path, [])
    alone = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    run = open_run(settings, alone)
    table = Table("stage", "steps", "attempts", "rolled back", "skipped", "samples", "times each")
    faults: list[str] = []
    for stage in STAGES:
        if run.folder.ledger(stage).is_dir():
            row, found = _audit_stage(run, settings, stage)
            table.add_row(stage, *row)
            faults += found
    if not table.rows:
        raise UserError(f"{folder}: no stage of this run has a ledger yet; train first, or give another folder")
    show(table)
    if faults:
        more = f"; and {len(faults) - NUM_NAMED:,} more" if len(faults) > NUM_NAMED else ""
        raise UserError(
            f"{folder}: {len(faults):,} steps did not use just what the order says: "
            f"{'; '.join(faults[:NUM_NAMED])}{more}. "
            "What was trained on them is not what the settings describe: keep the folder, and report it"
        )
    logger.info("every step used just the samples that the order gives it, each once")


def _audit_stage(run: Run, settings: Settings, stage: str) -> tuple[list[str], list[str]]:
    """The cells of a stage's row, and what is wrong, step by step."""
    part = settings.teach if stage == "teach" else settings.distill
    training = part.training
    samples = training_set(run, training, _objectives(settings, stage))
    order = sample_order(run, training, samples)
    try:
        found = history(read_ledgers(run.folder.ledger(stage)))
    except ValueError as error:
        raise UserError(f"{error}: it cannot be audited; restore it from a copy") from error
    skipped = read_skipped(run.folder.skipped(stage))
    last = _last_step(run, stage, training, num_samples=samples.num_samples)
    steps = [step for step in range(last) if step not in skipped]
    faults = judge(found, order, steps)
    used = np.zeros(samples.split.num_samples, np.int64)
    for step in steps:
        if step not in faults:
            np.add.at(used, order.batch(step), 1)
    drawn = np.delete(used, samples.unreadable)
    times = f"{drawn.min()} to {drawn.max()}" if last else ""
    numbers = (last, found.num_attempts, found.num_rolled_back, len(skipped), int(drawn.sum()))
    cells = [*(f"{number:,}" for number in numbers), times]
    return cells, [f"{stage} step {step + 1}: {fault}" for step, fault in faults.items()]


def judge(found: History, order: SampleOrder, steps: Iterable[int]) -> dict[int, str]:
    """What is wrong with those of the steps that did not use just what the order says."""
    faults = {step: _fault(found, step, order.batch(step)) for step in steps}
    return {step: fault for step, fault in faults.items() if fault is not None}


def _objectives(settings: Settings, stage: str) -> list[StudentObjective]:
    if stage == "teach":
        return list(settings.teach.objectives)
    return [loss for student in settings.distill.students.values() for loss in student.losses]


def _last_step(run: Run, stage: str, training: TrainingSettings, *, num_samples: int) -> int:
    """How many steps count: all of a finished stage, else those that the newest checkpoint covers."""
    record = run.folder.stages().get(stage)
    if record is not None and record["status"] == "done":
        return training.num_steps(num_samples)
    return max((mark.step for mark in CheckpointStore(run.folder.checkpoints(stage)).standing()), default=0)


def _fault(found: History, step: int, expected: NDArray[np.int64]) -> str | None:
    if step not in found.steps:
        return "no attempt has it in its ledger"
    each = found.steps[step]
    if each.samples is None:
        return f"attempt {each.attempt} has it for some of its ranks only"
    if not np.array_equal(each.samples, expected):
        wrong = int((each.samples != expected).sum()) if len(each.samples) == len(expected) else len(expected)
        return f"attempt {each.attempt} used {wrong} other samples"
    return None
