"""Two ranks fall back together, whichever of them sees the damage: on a disk, and on object storage."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.object_store import ObjectStore
from tests.processes import run_ranks
from tests.train.checkpoint_ranks import FILES, weights

LOOKING = {"disk": (0, 1), "s3": (0,), "s3 from two machines": (0, 1)}
"""The ranks that look at files: on object storage the first of each machine, which copies for the others."""


@dataclass(frozen=True)
class Outcome:
    """What two ranks were given."""

    place: str
    ranks: list[dict[str, dict[str, Any]]]
    printed: str
    left: list[str]
    """Names in the temporary folders of their machines."""

    def of(self, case: str) -> list[dict[str, Any]]:
        return [rank[case] for rank in self.ranks]

    def steps(self, case: str) -> list[int]:
        """The step that each rank returned, where its weights are those of that step."""
        given = self.of(case)
        assert all(torch.equal(each["weights"], weights(each["step"])) for each in given), given
        return [each["step"] for each in given]


TWO_MACHINES = pytest.param("s3 from two machines", marks=pytest.mark.nightly)


@pytest.fixture(scope="module", params=["disk", pytest.param("s3", marks=pytest.mark.chaos), TWO_MACHINES])
def outcome(
    request: pytest.FixtureRequest, object_store_server: ObjectStore, tmp_path_factory: pytest.TempPathFactory
) -> Outcome:
    """All cases of checkpoint_ranks.py, tried once in a place."""
    folder = tmp_path_factory.mktemp("ranks")
    url = str(folder / "checkpoints") if request.param == "disk" else f"s3://bucket/{folder.name}"
    printed = run_ranks(
        "tests.train.checkpoint_ranks",
        str(folder),
        url,
        "2" if "machines" in request.param else "1",
        size=2,
        environment=object_store_server.variables(),
    )
    ranks = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    left = [path.name for machine in folder.glob("machine-*") for path in machine.iterdir()]
    return Outcome(request.param, ranks, printed, left)


def test_the_ranks_that_look_share_all_files_between_them(outcome: Outcome) -> None:
    assert outcome.steps("whole") == [2, 2]
    names = [Path(name).name for name in FILES]
    looked = [sorted(each["looked"]) for each in outcome.of("whole")]
    if outcome.place == "disk":
        assert sorted(looked[0] + looked[1]) == names  # each of them once
        assert len(looked[0]) == len(looked[1])
    else:
        assert looked == [names if rank in LOOKING[outcome.place] else [] for rank in range(2)]


@pytest.mark.parametrize("name", FILES)
def test_both_ranks_load_the_one_before_whichever_file_is_damaged(outcome: Outcome, name: str) -> None:
    assert outcome.steps(f"step 2, {name}") == [1, 1]
    reason = f"step-00000002-a0001 is damaged and not used: {Path(name).name} has another sha256 than its manifest"
    assert reason in outcome.printed


@pytest.mark.parametrize("name", [FILES[0], FILES[-1]])
def test_where_all_are_damaged_both_ranks_say_the_same(outcome: Outcome, name: str) -> None:
    first, second = outcome.of(f"both steps, {name}")
    assert first["error"] == second["error"]
    assert "UserError: " in first["error"]
    assert "all 2 checkpoints are damaged" in first["error"]
    assert first["from"] == second["from"] == "None"


@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_rank_may_not_read_stops_both(outcome: Outcome, rank: int) -> None:
    case = f"rank {rank} refuses"
    if rank in LOOKING[outcome.place]:
        assert [each["error"] for each in outcome.of(case)] == [f"StorageError: rank {rank} may not read it"] * 2
    else:
        assert outcome.steps(case) == [2, 2]


def test_damage_that_only_one_machine_sees_counts_for_both(outcome: Outcome) -> None:
    expected = 1 if outcome.place == "s3 from two machines" else 2  # else rank 1 copies nothing
    assert outcome.steps("rank 1 has torn copies") == [expected] * 2


def test_the_ranks_of_a_machine_load_one_copy_that_goes_when_both_have(outcome: Outcome) -> None:
    first, second = (each["from"] for each in outcome.of("whole"))
    assert (first == second) == (outcome.place != "s3 from two machines")
    assert outcome.left == []
