"""Checksums of the samples of every step; `dpkd audit` compares them with the planned order.

    <run>/sample_log/<stage>/attempt-0003-rank-00001.log     samples used by one rank in one attempt at a stage
        {"attempt": 3, "rank": 1, "world_size": 2, "micro_batch_size": 32, "start_step": 200}    first line, JSON
        417 9f3a11bc      one line per step: its number, and `checksum` of the rank's samples in micro-batch order

The log is written before the commit of a checkpoint, so it covers every step of every checkpoint. Lines that a kill
loses belong to steps that are trained again.
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
        """The batches of the next `steps`; a step is added just before the last of its `micro_batches` is yielded."""
        batches = iter(batches)
        for step in steps:
            samples = []
            for drawn in range(1, micro_batches + 1):
                batch = next(batches)
                samples.append(batch.index_B.numpy())
                if drawn == micro_batches:  # before the yield: the caller may ask for no further batch
                    self.add(step, np.concatenate(samples))
                yield batch

    def add(self, step: int, samples: NDArray[np.int64]) -> None:
        """Adds the samples of a step."""
        self._content += f"{step} {checksum(samples)}\n".encode()

    def snapshot(self) -> Writer:
        """Returns a writer that writes all lines until now to the log and ignores its folder.

        The log is a part of checkpoints so that it covers each of them, and so that all ranks learn of a full disk.
        """
        data = bytes(self._content)
        return lambda _: storage.write_bytes_atomic(self._path, data)

    def load(self, folder: Path) -> None:
        """Does nothing: each attempt starts a new log."""


def truncate(folder: Path, *, from_attempt: int) -> None:
    """Removes the logs of `from_attempt`, which is about to start, and of later attempts with deleted checkpoints.

    One rank calls it.
    """
    with storage.write_errors(folder):
        for path in folder.glob(_LOGS):
            if int(path.name.split("-")[1]) >= from_attempt:
                path.unlink()


@dataclass(frozen=True)
class AttemptLog:
    """The samples that the ranks of one attempt used."""

    attempt: int
    world_size: int
    micro_batch_size: int
    start_step: int
    checksums: dict[int, dict[int, str]] = field(default_factory=dict, init=False, compare=False)
    """{step: {rank: `checksum` of the rank's samples}}."""


@dataclass(frozen=True)
class History:
    """The steps that count, each with the attempt that trained it, and the number of steps rolled back."""

    steps: dict[int, AttemptLog]
    num_attempts: int
    num_rolled_back: int


def read_history(folder: Path) -> History:
    """The history of a stage without the steps rolled back: each step belongs to the last attempt that covers it.

    Ignores a cut line at the end of a file. Raises `UserError` with the path of a file that is no log, or that
    contradicts the log of another rank of the attempt.
    """
    attempts: dict[int, AttemptLog] = {}
    for path in sorted(folder.glob(_LOGS)):
        try:
            lines = storage.read_bytes(path).decode().split("\n")[:-1]
            if not lines:  # killed at the first write, before any checkpoint
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
                    raise ValueError(f"step {int(step) + 1} is in it twice, or before the attempt started")
                next_step = int(step) + 1
                attempts[log.attempt].checksums.setdefault(int(step), {})[rank] = crc
        except (*NO_FILE, ValueError, TypeError, LookupError) as error:
            raise UserError(f"{path} cannot be audited ({error}); restore it from a copy") from error
    steps: dict[int, AttemptLog] = {}
    num_rolled_back = 0
    for _, log in sorted(attempts.items()):
        num_rolled_back += sum(step >= log.start_step for step in steps)
        steps = {step: earlier for step, earlier in steps.items() if step < log.start_step}
        steps |= dict.fromkeys(sorted(log.checksums), log)
    return History(steps, len(attempts), num_rolled_back)
