"""Saves the next step in forks of one process, which has imported what takes seconds.

`main` takes a line of JSON a fork, {"url", "scratch"}: where the checkpoints stand, and the temporary folder. It
answers with the fork's process id, and once that has ended with its exit code.
"""

import json
import os
import random
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import s3fs  # noqa: F401  fsspec imports it at the first use
import torch

from dpkd.engine.world import World
from dpkd.io import errors
from dpkd.train.checkpoint import Checkpoints

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
KEEP = 2


def content(step: int) -> bytes:
    """What the weights are after a step."""
    return random.Random(step).randbytes(50_000)


class Weights:
    """A part of two files."""

    def __init__(self, step: int) -> None:
        self.content = content(step)

    def snapshot(self) -> Callable[[Path], None]:
        halves = self.content[:20_000], self.content[20_000:]

        def write(folder: Path) -> None:
            for number, half in enumerate(halves):
                (folder / f"{number}.bin").write_bytes(half)

        return write

    def load(self, folder: Path) -> None:
        self.content = b"".join((folder / f"{number}.bin").read_bytes() for number in range(2))


def load(url: str) -> tuple[int, bytes, Checkpoints]:
    """The step and the content that a new attempt loads, and the attempt."""
    part, checkpoints = Weights(0), Checkpoints(url, world=ALONE, keep=KEEP)
    step = checkpoints.load_newest({"net": part})
    return step, part.content, checkpoints


def one_more_step(url: str) -> None:
    """Loads the newest step and saves the next."""
    step, found, checkpoints = load(url)
    assert found == content(step)
    checkpoints.save(step + 1, {"net": Weights(step + 1)})
    checkpoints.finish()


def _live(url: str, scratch: str) -> int:
    tempfile.tempdir, errors.WAITS_S = scratch, (0.0,)
    os.dup2(2, 1)  # standard output is for the answers
    try:
        one_more_step(url)
    except BaseException:  # noqa: BLE001  this is a process's end
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os._exit(_live(**json.loads(line)))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
