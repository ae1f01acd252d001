"""Agreement among ranks."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dpkd.engine.world import World, join
from tests.processes import run_ranks


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks was answered."""
    folder = tmp_path_factory.mktemp("world")
    run_ranks("tests.world_cases", str(folder), size=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    world = join()
    yield world
    world.leave()


def test_ranks_agree_on_flags(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["any of (true, false), (false, false)"] == (True, False)


def test_objects_travel_between_ranks(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["broadcast"] == {"from": 0}
        assert rank["gather"] == ["rank 0", "rank 1"]


def test_tensors_travel_between_ranks(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["mean"].tolist() == [1.5, 3.0]


def test_ranks_know_their_place(found: list[dict[str, Any]]) -> None:
    assert [rank["place"] for rank in found] == [(0, 2, 0, "cpu"), (1, 2, 1, "cpu")]


def test_a_process_group_ends_with_the_world_that_started_it(found: list[dict[str, Any]]) -> None:
    assert all(rank["a world that found a group left it alone"] and rank["left"] for rank in found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="joins on the CPU")
def test_a_process_alone_needs_no_environment(alone: World) -> None:
    assert (alone.rank, alone.size) == (0, 1)
    assert alone.any_of(False, True) == (False, True)
    assert alone.gather("me") == ["me"]
    assert alone.mean_(torch.tensor([3.0])).tolist() == [3.0]
    assert torch.distributed.is_initialized()
