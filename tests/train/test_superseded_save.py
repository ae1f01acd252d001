"""A save that a newer attempt overtakes ends on all its ranks, though what it had written was swept up."""

import threading
import time
from pathlib import Path

import pytest
import torch

from dpkd.engine.world import World
from dpkd.train.checkpoint import Checkpoints
from tests.processes import run_ranks
from tests.train.superseded_ranks import GO

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


@pytest.mark.nightly
def test_a_save_whose_files_a_newer_attempt_swept_up_ends(tmp_path: Path) -> None:
    place = tmp_path / "checkpoints"

    def overtake() -> None:
        while not list(place.glob("step-*/files-00000-of-00002.json")):
            time.sleep(0.02)
        assert Checkpoints(place, world=ALONE, keep=2).load_newest({}) == 0
        (tmp_path / GO).touch()

    newer = threading.Thread(target=overtake, daemon=True)
    newer.start()
    printed = run_ranks("tests.train.superseded_ranks", str(tmp_path), size=2)
    newer.join()
    for rank in range(2):
        assert f"rank {rank}: attempt 2 at this run has begun" in printed
    assert not list(place.glob("step-*/manifest.json"))
