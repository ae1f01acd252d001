"""Two ranks whose save is overtaken: rank 1 begins only once a newer attempt has begun.

`main FOLDER` prints what each was told.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

from dpkd.engine.world import join
from dpkd.io.fence import StaleAttempt
from dpkd.train.checkpoint import Checkpoints

GO = "go"


class Late:
    """A part that rank 1 begins to save late."""

    def __init__(self, go: Path, *, rank: int) -> None:
        self._go, self._rank = go, rank

    def snapshot(self) -> Callable[[Path], None]:
        while self._rank == 1 and not self._go.exists():
            time.sleep(0.02)
        return self._write

    def _write(self, folder: Path) -> None:
        (folder / f"{self._rank}.bin").write_bytes(b"state")

    def load(self, folder: Path) -> None:
        raise AssertionError(f"nothing was saved in {folder}")


def main() -> None:
    folder, world = Path(sys.argv[1]), join(timeout_s=60)
    checkpoints = Checkpoints(folder / "checkpoints", world=world, keep=2)
    parts = {"net": Late(folder / GO, rank=world.rank)}
    checkpoints.load_newest(parts)
    checkpoints.save(1, parts)
    try:
        checkpoints.finish()
    except StaleAttempt as error:
        print(f"rank {world.rank}: {error}")
    world.leave()
