"""Steps that spoil a network: noticing them, going back to the newest checkpoint, and going on without their batch.

<run>/skipped/<stage>.json     {"steps": {"417": why}, "checksum": …}: steps passed over, now and in later attempts
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
"""Last norms that a spike is measured by, and the fewest that do."""
SMALL_NORM = 1.0
"""Least value of their median: the norms of a network that has learnt its images by heart are next to nothing."""


class Diverged(Exception):
    """A step has spoilt a network: every rank raises it together, because they share the norm of the gradient."""

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
    """Checks the norm of every gradient: it must be finite, and no more than `spike` times the median of the last."""

    def __init__(self, *, spike: float | None) -> None:
        self._spike = spike
        self._norms: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=NUM_NORMS))

    def check(self, norms: Iterable[Norm]) -> None:
        """Raises `Diverged` for the first of the norms, in the order of steps, that shows a spoilt network."""
        for norm in norms:
            if not math.isfinite(norm.value):
                rate = f"learning rate {norm.learning_rate:.2g}"
                raise Diverged(norm.step, f"{norm.name}: the gradient is {norm.value} ({rate})")
            last = self._norms[norm.name]
            usual = median(last) if len(last) >= NUM_NEEDED else math.inf
            if self._spike is not None and norm.value > self._spike * max(usual, SMALL_NORM):
                raise Diverged(
                    norm.step,
                    f"{norm.name}: the gradient's norm is {norm.value:.3g}, and was {usual:.3g} in the median "
                    f"(training.spike: {self._spike:g})",
                )
            last.append(norm.value)


def read_skipped(path: Path) -> dict[int, str]:
    """Step -> reason, of those that a stage passes over; raises `UserError` that names the file where it is damaged."""
    record = read_record(path, way_out="restore it, or delete it to go on without skipping any step")
    return {int(step): reason for step, reason in record.get("steps", {}).items()}


def write_skipped(path: Path, reasons: Mapping[int, str]) -> None:
    """Adds to the steps that a stage passes over."""
    reasons = {**read_skipped(path), **reasons}  # a newer attempt may have added some
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
    """Calls `attempt` with the step of the newest checkpoint, which it loads, and the steps to pass over.

    Where that raises `Diverged`, the file `skipped` gets the step, and it begins again. Raises `UserError`, on every
    rank, past `limit` skipped steps, and without a checkpoint to go back to.
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
                before = f"; {len(reasons)} earlier steps were skipped for the like" if reasons else ""
                raise UserError(
                    f"{step}: {fault.reason}{before}. The last checkpoint stands: lower learning_rate or "
                    f"optimizer.clip, look at the batch, or raise training.max_skipped_steps ({limit})"
                ) from fault
            reasons[fault.step] = fault.reason
            if world.rank == 0:
                write_skipped(skipped, reasons)
            start_step = checkpoints.load_newest(parts)
            if not start_step:
                raise UserError(
                    f"{step}: {fault.reason}, and no checkpoint stands to go back to: lower "
                    "learning_rate or optimizer.clip, or save earlier (training.checkpoint_every)"
                ) from fault
            if world.rank == 0:
                logger.info(f"{step} is skipped: {fault.reason}; back to the checkpoint after step {start_step}")
