"""Which samples reached the losses of every step, as checksums: `dpkd audit` compares them to the order.

    <run>/sample_log/<stage>/attempt-0003-rank-00001.log     what one rank of one attempt at a stage used
        {"attempt": 3, "rank": 1, "world_size": 2, "micro_batch_size": 32, "start_step": 200}    a line of JSON, then
        417 9f3a11bc      a line a step: its number, and `checksum` of the rank's samples in its micro-batches' order

It is flushed to the disk before a checkpoint counts, so that it covers every step that any checkpoint covers; what a
kill cuts off at its end belongs to steps that are done again.
"""

import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpkd.data.stream import Batch
from dpkd.engine.state import Writer
from dpkd.engine.world import World
from dpkd.errors import UserError
from dpkd.io import storage
from dpkd.io.errors import NO_FILE

_NAME = re.compile(r"attempt-([0-9]{4,})-rank-([0-9]{5,})\.log")


def checksum(samples: NDArray[np.int64]) -> str:
    """CRC-32 of sample numbers as little-endian int64, in 8 hex digits."""
    return f"{zlib.crc32(samples.astype('<i8').tobytes()):08x}"


class SampleLog:
    """The open log of this rank's attempt; a part of every checkpoint."""

    def __init__(self, folder: Path, *, attempt: int, world: World, micro_batch_size: int, start_step: int) -> None:
        self._path = folder / f"attempt-{attempt:04d}-rank-{world.rank:05d}.log"
        head = {"attempt": attempt, "rank": world.rank, "world_size": world.size}
        head |= {"micro_batch_size": micro_batch_size, "start_step": start_step}
        self._unwritten = [json.dumps(head) + "\n"]
        self._size_bytes = 0

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
        self._unwritten.append(f"{step} {checksum(samples)}\n")

    def snapshot(self) -> Writer:
        """Takes the new lines; the writer that it returns puts them onto the disk, with the checkpoint they belong to.

        So all ranks learn of a disk that takes no more, and lines that a disk failed to take are written again.
        """
        data, offset = "".join(self._unwritten).encode(), self._size_bytes
        self._unwritten = []
        self._size_bytes += len(data)

        def write(_: Path) -> None:
            with storage.write_errors(self._path):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with self._path.open("ab") as file:
                    file.truncate(offset)  # a try before this one may have left some of them
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                storage.sync_folder(self._path.parent)

        return write

    def load(self, folder: Path) -> None:
        """Does nothing: an attempt begins a log of its own."""


def truncate(folder: Path, *, from_attempt: int) -> None:
    """Removes the logs of an attempt that is about to begin, and of later ones: their checkpoints were deleted.

    One rank calls it.
    """
    with storage.write_errors(folder):
        for path in folder.glob("attempt-*-rank-*.log"):
            match = _NAME.fullmatch(path.name)
            if match is not None and int(match[1]) >= from_attempt:
                path.unlink()


@dataclass(frozen=True)
class RankLog:
    """What one rank of one attempt used."""

    attempt: int
    rank: int
    world_size: int
    micro_batch_size: int
    start_step: int
    checksums: dict[int, str]
    """Step -> `checksum` of this rank's samples."""

    @property
    def layout(self) -> tuple[int, int, int]:
        """What the ranks of an attempt have in common: world size, micro-batch size and first step."""
        return self.world_size, self.micro_batch_size, self.start_step


@dataclass(frozen=True)
class Step:
    """How one step was made that led to the networks as they are."""

    attempt: int
    world_size: int
    micro_batch_size: int
    checksums: dict[int, str]
    """Rank -> `checksum` of its samples."""


@dataclass(frozen=True)
class History:
    """The steps that count, how many attempts made them, and how many were done and rolled back."""

    steps: dict[int, Step]
    num_attempts: int
    num_rolled_back: int


def read_history(folder: Path) -> History:
    """All logs of a stage, net of what was rolled back: a step counts as the last attempt made it that covers it.

    A line cut short at a file's end is left out. Raises `UserError` that names a file which is no log, or whose content
    is not that of its name, or the attempt whose ranks contradict one another.
    """
    by_attempt: dict[int, list[RankLog]] = {}
    for path in sorted(folder.glob("attempt-*-rank-*.log")):
        log = _read(path)
        if log is not None:
            by_attempt.setdefault(log.attempt, []).append(log)
    steps: dict[int, Step] = {}
    num_rolled_back = 0
    for attempt, logs in sorted(by_attempt.items()):
        if len({log.layout for log in logs}) > 1:
            raise UserError(f"{folder}: the logs of attempt {attempt} contradict one another; restore them")
        world_size, micro_batch_size, start_step = logs[0].layout
        num_rolled_back += sum(step >= start_step for step in steps)
        steps = {step: made for step, made in steps.items() if step < start_step}
        for step in sorted({step for log in logs for step in log.checksums}):
            checksums = {log.rank: log.checksums[step] for log in logs if step in log.checksums}
            steps[step] = Step(attempt, world_size, micro_batch_size, checksums)
    return History(steps, len(by_attempt), num_rolled_back)


def _read(path: Path) -> RankLog | None:
    """The log in a file; None where a kill at its first flush, before any checkpoint, left no whole line."""
    try:
        whole = storage.read_bytes(path).decode().split("\n")[:-1]
        if not whole:
            return None
        head, lines = json.loads(whole[0]), whole[1:]
        rows = [line.split(" ") for line in lines]
        log = RankLog(**head, checksums={int(step): crc for step, crc in rows})
        steps = list(log.checksums)
        match = _NAME.fullmatch(path.name)
        if match is None or (int(match[1]), int(match[2])) != (log.attempt, log.rank):
            raise ValueError(f"it is the log of attempt {log.attempt}, rank {log.rank}")
        if len(steps) < len(lines) or steps != sorted(steps) or (steps and steps[0] < log.start_step):
            raise ValueError("a step stands in it twice, out of order, or before the attempt began")
    except (*NO_FILE, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be audited ({error}); restore it from a copy") from error
    return log
