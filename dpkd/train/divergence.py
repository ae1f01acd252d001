"""Detection of steps that spoil a network; training returns to the newest checkpoint and skips their batch.

<run>/skipped/<stage>.json     {"steps": {"417": reason}, "checksum": …}: steps skipped, in later attempts too
"""

import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import NamedTuple

from dpkd.engine.world import World
from dpkd.errors import UserError
from dpkd.io import storage
from dpkd.io.record import checked, read_record
from dpkd.log import logger
from dpkd.train.checkpoint import Checkpoints, Part

NUM_NORMS, NUM_NEEDED = 64, 16
"""Number of last norms that a spike is compared with, and the fewest that are enough."""
SMALL_NORM = 1.0
"""Least value of their median: the norms of a network that has memorised its images are almost 0."""


class Diverged(Exception):
    """A step has spoilt a network. All ranks raise it together, because they share the gradient norm."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(step, reason)
        self.step, self.reason = step, reason


class Norm(NamedTuple):
    """The gradient norm of one network at one step."""

    name: str
    step: int
    learning_rate: float
    value: float


class NormGuard:
    """Checks that each gradient norm is finite, and at most `spike` times the median of the last norms."""

    def __init__(self, *, spike: float | None) -> None:
        self._spike = spike
        self._norms: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=NUM_NORMS))

    def check(self, norms: Iterable[Norm]) -> None:
        """Raises `Diverged` for the first norm, in the order of steps, that shows a spoilt network."""
        for norm in norms:
            if not math.isfinite(norm.value):
                rate = f"learning rate {norm.learning_rate:.2g}"
                raise Diverged(norm.step, f"{norm.name}: the gradient is {norm.value} ({rate})")
            last = self._norms[norm.name]
            usual = median(last) if len(last) >= NUM_NEEDED else math.inf
            if self._spike is not None and norm.value > self._spike * max(usual, SMALL_NORM):
                raise Diverged(
                    norm.step,
                    f"{norm.name}: the gradient norm is {norm.value:.3g}, and the median of the last is {usual:.3g} "
                    f"(training.spike: {self._spike:g})",
                )
            last.append(norm.value)


def read_skipped(path: Path) -> dict[int, str]:
    """The steps that a stage skips, as {step: reason}; raises `UserError` with the path if the file is damaged."""
    record = read_record(path, way_out="restore it, or delete it to go on without skipping any step")
    return {int(step): reason for step, reason in record.get("steps", {}).items()}


def write_skipped(path: Path, reasons: Mapping[int, str]) -> None:
    """Adds steps to those that a stage skips, with their reasons."""
    reasons = {**read_skipped(path), **reasons}  # a newer attempt may have added steps
    content = {"steps": {str(step): reason for step, reason in sorted(reasons.items())}}
    storage.write_bytes_atomic(path, checked(content))


def train_past_divergence(
    attempt: Callable[[int, frozenset[int]], None],
    *,
    checkpoints: Checkpoints,
    parts: Mapping[str, Part],
    skipped: Path,
    limit: int,
    world: World,
) -> None:
    """Loads the newest checkpoint and calls `attempt` with its step and the steps to skip.

    If `attempt` raises `Diverged`, the step is added to the file `skipped`, and the newest checkpoint is loaded again.
    Raises `UserError`, on every rank, after `limit` skipped steps, or if there is no checkpoint to go back to.
    """
    reasons = world.broadcast(read_skipped(skipped) if world.rank == 0 else {})
    start_step = checkpoints.load_newest(parts)
    while True:
        try:
            attempt(start_step, frozenset(reasons))
            return
        except Diverged as fault:
            step = f"step {fault.step + 1}"
            if len(reasons) >= limit:
                before = f"; {len(reasons)} earlier steps were skipped for such reasons" if reasons else ""
                raise UserError(
                    f"{step}: {fault.reason}{before}. The last checkpoint is kept: lower learning_rate or "
                    f"optimizer.clip, check the batch, or raise training.max_skipped_steps ({limit})"
                ) from fault
            reasons[fault.step] = fault.reason
            if world.rank == 0:
                write_skipped(skipped, reasons)
            start_step = checkpoints.load_newest(parts)
            if not start_step:
                raise UserError(
                    f"{step}: {fault.reason}, and there is no checkpoint to go back to: lower "
                    "learning_rate or optimizer.clip, or save earlier (training.checkpoint_every)"
                ) from fault
            if world.rank == 0:
                logger.info(f"{step} is skipped: {fault.reason}; back to the checkpoint after step {start_step}")
