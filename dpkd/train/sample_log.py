"""Which samples every step used, as they reached the losses: what `dpkd audit` holds against the order.

    <run>/ledger/<stage>/attempt-0003-rank-00001.ledger     what one rank of one attempt at a stage used
        {"attempt": 3, "rank": 1, "world_size": 2, "micro_batch_size": 32, "start_step": 200}    a line of JSON, then
        step       uint64, little-endian: for each step
        count      uint32, little-endian
        samples    count x uint32, in the order of this rank's micro-batches

It is flushed to the disk before a checkpoint counts, so that it covers every step that any checkpoint covers; what a
kill cuts off at its end belongs to steps that are done again.
"""

import json
import os
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpkd.data.stream import Batch
from dpkd.engine.state import Writer
from dpkd.engine.world import World
from dpkd.io import storage
from dpkd.io.errors import NO_FILE
from dpkd.io.untrusted import parse_json

_HEAD = struct.Struct("<QI")
_NAME = re.compile(r"attempt-([0-9]{4,})-rank-([0-9]{5,})\.ledger")
_NUMBERS = ("attempt", "rank", "world_size", "micro_batch_size", "start_step")


class Ledger:
    """The open ledger of this rank's attempt; a part of every checkpoint."""

    def __init__(self, folder: Path, *, attempt: int, world: World, micro_batch_size: int, start_step: int) -> None:
        self._path = folder / f"attempt-{attempt:04d}-rank-{world.rank:05d}.ledger"
        head = {"attempt": attempt, "rank": world.rank, "world_size": world.size}
        head |= {"micro_batch_size": micro_batch_size, "start_step": start_step}
        self._unwritten = [json.dumps(head).encode() + b"\n"]
        self._size_bytes = 0

    def recorded(self, batches: Iterable[Batch], *, steps: Iterable[int], micro_batches: int) -> Iterator[Batch]:
        """The batches, each step's samples noted as the last of its `micro_batches` is given out.

        `steps` are those to come.
        """
        batches = iter(batches)
        for step in steps:
            used = []
            for drawn in range(1, micro_batches + 1):
                batch = next(batches)
                used.append(batch.index_B.numpy())
                if drawn == micro_batches:  # now: nobody may ask for another batch after this one
                    self.add(step, np.concatenate(used))
                yield batch

    def add(self, step: int, samples: NDArray[np.int64]) -> None:
        """Notes what a step used."""
        self._unwritten.append(_HEAD.pack(step, len(samples)) + samples.astype("<u4").tobytes())

    def snapshot(self) -> Writer:
        """Takes what was noted; what it returns puts that onto the disk, as a part of the checkpoint that it covers.

        So all ranks learn of a disk that takes no more, and what a disk failed to take is written again after a while.
        """
        data, at = b"".join(self._unwritten), self._size_bytes
        self._unwritten = []
        self._size_bytes += len(data)
        return lambda _: self._write(data, at)

    def load(self, folder: Path) -> None:
        """Does nothing: an attempt begins a ledger of its own."""

    def _write(self, data: bytes, at: int) -> None:
        """Puts bytes at their place at the end; raises `UserError` where the disk does not take them."""
        with storage.write_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                file.truncate(at)  # a try before this one may have left some of them
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            storage.sync_folder(self._path.parent)


@dataclass(frozen=True)
class RankLedger:
    """What one rank of one attempt used."""

    attempt: int
    rank: int
    world_size: int
    micro_batch_size: int
    start_step: int
    samples_of: dict[int, NDArray[np.int64]]
    """step -> samples, in the order of the rank's micro-batches."""


def read_ledgers(folder: Path) -> list[RankLedger]:
    """All ledgers of a stage, by attempt and rank; what is cut short at a file's end is left out.

    Raises ValueError that names a file that cannot be the ledger of what it is named after.
    """
    paths = sorted(folder.glob("attempt-*-rank-*.ledger"))
    return [ledger for path in paths if (ledger := _read(path)) is not None]


def forget(folder: Path, *, from_attempt: int) -> None:
    """Removes the ledgers from an attempt on, which is about to begin: what they tell of has no checkpoint any more.

    So it is where somebody deleted the checkpoints to start the stage anew. One rank calls it.
    """
    with storage.write_errors(folder):
        for path in folder.glob("attempt-*-rank-*.ledger"):
            found = _NAME.fullmatch(path.name)
            if found is not None and int(found[1]) >= from_attempt:
                path.unlink()


def _read(path: Path) -> RankLedger | None:
    try:
        first, newline, rest = storage.read_bytes(path).partition(b"\n")
    except NO_FILE as error:
        raise ValueError(f"{path} is no file") from error
    if not newline:  # killed at its first flush, before any checkpoint
        return None
    try:
        head = parse_json(first)
        numbers = {name: int(head[name]) for name in _NUMBERS}
        if not (0 <= numbers["rank"] < numbers["world_size"] and numbers["micro_batch_size"] >= 1):
            raise ValueError("its numbers do not fit")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: the first line is not that of a ledger") from error
    found = _NAME.fullmatch(path.name)
    if found is None or (int(found[1]), int(found[2])) != (numbers["attempt"], numbers["rank"]):
        raise ValueError(f"{path} is the ledger of attempt {numbers['attempt']}, rank {numbers['rank']}")
    samples_of: dict[int, NDArray[np.int64]] = {}
    at, least = 0, numbers["start_step"]
    while at + _HEAD.size <= len(rest):
        step, count = _HEAD.unpack_from(rest, at)
        end = at + _HEAD.size + 4 * count
        if end > len(rest):
            break
        if step < least:
            raise ValueError(f"{path} has step {step + 1} a second time, or before the attempt began")
        if count % numbers["micro_batch_size"]:
            raise ValueError(f"{path} has {count} samples at step {step + 1}, no whole number of micro-batches")
        least = step + 1
        samples_of[step] = np.frombuffer(rest, "<u4", count, at + _HEAD.size).astype(np.int64)
        at = end
    return RankLedger(**numbers, samples_of=samples_of)


@dataclass(frozen=True)
class Step:
    """What made one step of the history that led to the networks as they are."""

    attempt: int
    samples: NDArray[np.int64] | None
    """Of all ranks, as the order gives them; None where a rank's record is missing."""


@dataclass(frozen=True)
class History:
    """The steps that count, how many attempts made them, and how many were done and rolled back."""

    steps: dict[int, Step]
    num_attempts: int
    num_rolled_back: int


def history(ledgers: Iterable[RankLedger]) -> History:
    """Net of what was rolled back: a step counts as the last attempt made it that began at or before it.

    Raises ValueError where the ranks of an attempt do not say the same of it.
    """
    steps: dict[int, Step] = {}
    num_rolled_back = 0
    by_attempt: dict[int, list[RankLedger]] = {}
    for ledger in ledgers:
        by_attempt.setdefault(ledger.attempt, []).append(ledger)
    for attempt, ranks in sorted(by_attempt.items()):
        if len({(rank.world_size, rank.micro_batch_size, rank.start_step) for rank in ranks}) > 1:
            raise ValueError(f"the ledgers of the ranks of attempt {attempt} are not of one attempt")
        start = ranks[0].start_step
        num_rolled_back += sum(step >= start for step in steps)
        steps = {step: each for step, each in steps.items() if step < start}
        for step in sorted({step for rank in ranks for step in rank.samples_of}):
            steps[step] = Step(attempt, _joined(ranks, step))
    return History(steps, len(by_attempt), num_rolled_back)


def _joined(ranks: list[RankLedger], step: int) -> NDArray[np.int64] | None:
    """A step's samples over all ranks, which take micro-batches in turn, in the order of the global batch."""
    size, micro = ranks[0].world_size, ranks[0].micro_batch_size
    found = {rank.rank: rank.samples_of[step] for rank in ranks if step in rank.samples_of}
    if set(found) != set(range(size)):
        return None
    dealt = np.stack([found[rank].reshape(-1, micro) for rank in range(size)], axis=1)
    return dealt.reshape(-1)
