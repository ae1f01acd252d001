"""Which samples reached the losses of every step, as checksums: `dpkd audit` compares them to the order.

    <run>/sample_log/<stage>/attempt-0003-rank-00001.log     what one rank of one attempt at a stage used
        {"attempt": 3, "rank": 1, "world_size": 2, "micro_batch_size": 32, "start_step": 200}    a line of JSON, then
        417 9f3a11bc      a line a step: its number, and `checksum` of the rank's samples in its micro-batches' order

It is written before a checkpoint counts, so that it covers every step that any checkpoint covers; what a kill loses
belongs to steps that are done again.
"""

import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpkd.data.stream import Batch
from dpkd.engine.state import Writer
from dpkd.engine.world import World
from dpkd.errors import UserError
from dpkd.io import storage
from dpkd.io.errors import NO_FILE

_LOGS = "attempt-*-rank-*.log"


def checksum(samples: NDArray[np.int64]) -> str:
    """CRC-32 of sample numbers as little-endian int64, in 8 hex digits."""
    return f"{zlib.crc32(samples.astype('<i8').tobytes()):08x}"


class SampleLog:
    """The open log of this rank's attempt; a part of every checkpoint."""

    def __init__(self, folder: Path, *, attempt: int, world: World, micro_batch_size: int, start_step: int) -> None:
        self._path = folder / f"attempt-{attempt:04d}-rank-{world.rank:05d}.log"
        head = {"attempt": attempt, "rank": world.rank, "world_size": world.size}
        head |= {"micro_batch_size": micro_batch_size, "start_step": start_step}
        self._content = bytearray(json.dumps(head).encode() + b"\n")

    def record(self, batches: Iterable[Batch], *, steps: Iterable[int], micro_batches: int) -> Iterator[Batch]:
        """The batches of the coming `steps`; a step is added as the last of its `micro_batches` is given out."""
        batches = iter(batches)
        for step in steps:
            samples = []
            for drawn in range(1, micro_batches + 1):
                batch = next(batches)
                samples.append(batch.index_B.numpy())
                if drawn == micro_batches:  # now: nobody may ask for another batch after this one
                    self.add(step, np.concatenate(samples))
                yield batch

    def add(self, step: int, samples: NDArray[np.int64]) -> None:
        """Adds what a step used."""
        self._content += f"{step} {checksum(samples)}\n".encode()

    def snapshot(self) -> Writer:
        """The writer puts all lines until now into the log, whatever folder it is given.

        The log is a part of checkpoints so that it covers each of them, and so that all ranks learn of a full disk.
        """
        data = bytes(self._content)
        return lambda _: storage.write_bytes_atomic(self._path, data)

    def load(self, folder: Path) -> None:
        """Does nothing: an attempt begins a log of its own."""


def truncate(folder: Path, *, from_attempt: int) -> None:
    """Removes the logs of an attempt that is about to begin, and of later ones, whose checkpoints were deleted.

    One rank calls it.
    """
    with storage.write_errors(folder):
        for path in folder.glob(_LOGS):
            if int(path.name.split("-")[1]) >= from_attempt:
                path.unlink()


@dataclass(frozen=True)
class AttemptLog:
    """What the ranks of one attempt used."""

    attempt: int
    world_size: int
    micro_batch_size: int
    start_step: int
    checksums: dict[int, dict[int, str]] = field(default_factory=dict, init=False, compare=False)
    """Step -> rank -> `checksum` of its samples."""


@dataclass(frozen=True)
class History:
    """The steps that count, each with the attempt that made it, and how many steps were done and rolled back."""

    steps: dict[int, AttemptLog]
    num_attempts: int
    num_rolled_back: int


def read_history(folder: Path) -> History:
    """All logs of a stage, net of what was rolled back: a step counts as the last attempt made it that covers it.

    A line cut short at a file's end is left out. Raises `UserError` that names a file which is no log, or contradicts
    that of another rank of its attempt.
    """
    attempts: dict[int, AttemptLog] = {}
    for path in sorted(folder.glob(_LOGS)):
        try:
            lines = storage.read_bytes(path).decode().split("\n")[:-1]
            if not lines:  # a kill at its first flush, before any checkpoint
                continue
            head: dict[str, int] = json.loads(lines[0])
            rank = head.pop("rank")
            log = AttemptLog(**head)
            if attempts.setdefault(log.attempt, log) != log:
                raise ValueError(f"it contradicts the logs of other ranks of attempt {log.attempt}")
            next_step = log.start_step
            for line in lines[1:]:
                step, crc = line.split(" ")
                if int(step) < next_step:
                    raise ValueError(f"step {int(step) + 1} is in it twice, or before the attempt began")
                next_step = int(step) + 1
                attempts[log.attempt].checksums.setdefault(int(step), {})[rank] = crc
        except (*NO_FILE, ValueError, TypeError, LookupError) as error:
            raise UserError(f"{path} cannot be audited ({error}); restore it from a copy") from error
    steps: dict[int, AttemptLog] = {}
    num_rolled_back = 0
    for _, log in sorted(attempts.items()):
        num_rolled_back += sum(step >= log.start_step for step in steps)
        steps = {step: made for step, made in steps.items() if step < log.start_step}
        steps |= dict.fromkeys(sorted(log.checksums), log)
    return History(steps, len(attempts), num_rolled_back)
