"""Two ranks that save steps 1 and 2, and load while files are damaged; each keeps what it was given by case.

`main FOLDER URL NUM_MACHINES` writes `FOLDER/<rank>.pt`. On two machines each rank is the first of its own, with a
temporary folder of its own.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dpkd.engine.world import World, join
from dpkd.errors import StorageError, UserError
from dpkd.io import storage
from dpkd.io.checkpoint_store import CheckpointId, CheckpointStore
from dpkd.train.checkpoint import Checkpoints

NUM_WEIGHTS = 4
FILES = [f"net/weight-{number}.bin" for number in range(NUM_WEIGHTS)]
"""Of a checkpoint; those with even numbers are rank 0's."""


def weights(step: int) -> torch.Tensor:
    """The weights after a step."""
    return torch.arange(NUM_WEIGHTS, dtype=torch.float32) + 10 * step


class Shares:
    """A part of which each rank writes a share, a file a weight; every rank loads all of them."""

    def __init__(self, world: World, *, step: int, lingers: bool = False) -> None:
        self.world, self.lingers = world, lingers
        self.weights = weights(step)
        self.loaded_from: Path | None = None

    def snapshot(self) -> Callable[[Path], None]:
        mine = {number: self.weights[number].clone() for number in range(self.world.rank, NUM_WEIGHTS, 2)}

        def write(folder: Path) -> None:
            for number, weight in mine.items():
                (folder / Path(FILES[number]).name).write_bytes(weight.numpy().tobytes())

        return write

    def load(self, folder: Path) -> None:
        if self.lingers and self.world.rank == 1:
            time.sleep(0.5)  # rank 0 is done by then, and must not have removed the files
        content = b"".join((folder / Path(name).name).read_bytes() for name in FILES)
        self.weights = torch.frombuffer(bytearray(content), dtype=torch.float32)
        self.loaded_from = folder


class Rank:
    """One rank, what it looks at, and what it was given."""

    def __init__(self, world: World, url: str) -> None:
        self.world, self.url = world, url
        self.found: dict[str, dict[str, Any]] = {}
        self._looked: list[str] = []

    def save(self) -> None:
        checkpoints = Checkpoints(self.url, world=self.world, keep=3)
        checkpoints.load_newest({"net": Shares(self.world, step=0)})
        for step in (1, 2):
            checkpoints.save(step, {"net": Shares(self.world, step=step)})
        checkpoints.finish()

    def load(self, case: str, *, lingers: bool = False) -> None:
        """Loads, and keeps the outcome under the name of the case."""
        part, step, error = Shares(self.world, step=0, lingers=lingers), None, None
        self._looked.clear()
        try:
            step = Checkpoints(self.url, world=self.world, keep=3).load_newest({"net": part})
        except (UserError, StorageError) as fault:
            error = f"{type(fault).__name__}: {fault}"
        given = {"step": step, "error": error, "weights": part.weights, "from": str(part.loaded_from)}
        self.found[case] = given | {"looked": list(self._looked)}
        self.world.barrier()

    @contextmanager
    def damaged(self, name: str, *, steps: tuple[int, ...]) -> Iterator[None]:
        """Has one bit of the file wrong, in the checkpoints of these steps, while the body runs."""
        self._flip(name, steps)
        yield
        self._flip(name, steps)

    def _flip(self, name: str, steps: tuple[int, ...]) -> None:
        for step in steps if self.world.rank == 0 else ():
            file = CheckpointStore(self.url).place(CheckpointId(step, 1), name)
            first, *others = storage.read_bytes(file)
            storage.write_bytes_atomic(file, bytes([first ^ 1, *others]))
        self.world.barrier()

    @contextmanager
    def watched(self, *, refuses: bool) -> Iterator[None]:
        """Notes each file that this rank looks at while the body runs, and refuses it as if it had no permission."""
        sha256 = storage.sha256

        def look(path: str | Path) -> str:
            self._looked.append(Path(path).name)
            if refuses:
                raise StorageError(f"rank {self.world.rank} may not read it")
            return sha256(path)

        storage.sha256 = look
        yield
        storage.sha256 = sha256

    @contextmanager
    def torn_copies(self) -> Iterator[None]:
        """Has every file of step 2 that this rank copies cut short while the body runs."""
        copy_here = storage.copy_here

        def tear(url: str | Path, file: Path) -> None:
            copy_here(url, file)
            if CheckpointId(2, 1).name in str(url):
                os.truncate(file, 3)

        storage.copy_here = tear
        yield
        storage.copy_here = copy_here


def main() -> None:
    folder, url, num_machines = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    world = join(timeout_s=60)
    machine = folder / f"machine-{world.rank if num_machines == 2 else 0}"
    machine.mkdir(exist_ok=True)
    tempfile.tempdir = str(machine)
    if num_machines == 2:
        world = replace(world, local_rank=0)
    rank = Rank(world, url)
    rank.save()
    with rank.watched(refuses=False):
        rank.load("whole", lingers=True)
    for name in FILES:
        with rank.damaged(name, steps=(2,)):
            rank.load(f"step 2, {name}")
    for name in (FILES[0], FILES[-1]):
        with rank.damaged(name, steps=(1, 2)):
            rank.load(f"both steps, {name}")
    for refusing in range(world.size):
        with rank.watched(refuses=world.rank == refusing):
            rank.load(f"rank {refusing} refuses")
    if world.rank == 1:
        with rank.torn_copies():
            rank.load("rank 1 has torn copies")
    else:
        rank.load("rank 1 has torn copies")
    torch.save(rank.found, folder / f"{world.rank}.pt")
    world.leave()
