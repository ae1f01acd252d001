"""Agreement among ranks, and the request to stop."""

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dpkd.world import World, clear_stop_request, install_stop_handler, join, request_stop, stop_requested
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


@pytest.fixture
def signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    clear_stop_request()
    yield
    clear_stop_request()
    for number, handler in before.items():
        signal.signal(number, handler)


def test_ranks_agree_on_flags(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert not rank["all of (true, false)"]
        assert rank["all of (true, true)"]
        assert rank["any of (true, false)"]
        assert not rank["any of (false, false)"]


def test_objects_travel_between_ranks(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["broadcast"] == {"from": 0}
        assert rank["broadcast from 1"] == {"from": 1}
        assert rank["gather"] == ["rank 0", "rank 1"]


def test_tensors_travel_between_ranks(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["mean"].tolist() == [1.5, 3.0]
        assert rank["first"].tolist() == [0.0, 0.0]
        assert rank["concatenate"].tolist() == [0.0, 0.0, 1.0, 1.0]


def test_ranks_know_their_place(found: list[dict[str, Any]]) -> None:
    assert [rank["place"] for rank in found] == [(0, 2, 0, "cpu"), (1, 2, 1, "cpu")]


def test_a_process_group_ends_with_the_world_that_started_it(found: list[dict[str, Any]]) -> None:
    assert all(rank["a world that found a group left it alone"] and rank["left"] for rank in found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="joins on the CPU")
def test_a_process_alone_needs_no_environment(alone: World) -> None:
    assert (alone.rank, alone.size) == (0, 1)
    assert alone.all_true(True)
    assert not alone.any_true(False)
    assert alone.gather("me") == ["me"]
    assert alone.mean_(torch.tensor([3.0])).tolist() == [3.0]
    assert torch.distributed.is_initialized()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_to_stop(signals: None, number: signal.Signals) -> None:
    install_stop_handler()
    assert not stop_requested()
    os.kill(os.getpid(), number)
    assert stop_requested()


def test_a_second_interrupt_ends_at_once(signals: None) -> None:
    install_stop_handler()
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_launcher_can_ask_to_stop_without_a_signal(signals: None) -> None:
    request_stop()
    assert stop_requested()
