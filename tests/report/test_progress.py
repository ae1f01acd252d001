"""Lines, bars and events."""

import json
import sys
from pathlib import Path

import pytest

from dpkd.errors import StorageError
from dpkd.log import Progress, duration, logger
from dpkd.run.folder import RunFolder


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_come_every_ten_seconds_with_count_rate_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Progress("prepare", 1000, clock=clock) as progress:
        for _ in range(20):
            clock.now += 1.0
            progress.advance(50)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "prepare: 500 of 1,000 images (50%), 50 images/s, 10 s left",
        "prepare: 1,000 of 1,000 images (100%), 50 images/s, 0 s left",
        "prepare: 1,000 images in 20 s, 50 images/s",
    ]


def test_what_an_earlier_run_did_counts_as_done_but_not_for_the_rate(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Progress("teach", 100, unit="steps", start=60, clock=clock) as progress:
        clock.now = 10.0
        progress.reach(80, note="loss 1.25")
    first, last = capsys.readouterr().out.splitlines()
    assert first == "teach: 80 of 100 steps (80%), 2.0 steps/s, 10 s left, loss 1.25"
    assert last == "teach: 20 steps in 10 s, 2.0 steps/s, loss 1.25"


def test_other_ranks_and_failed_work_print_no_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("teach", 3, shown=False) as progress:
        progress.advance(3)
    with pytest.raises(KeyError), Progress("teach", 3):
        raise KeyError
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_a_bar_and_lines_above_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with Progress("pack [1]", 4) as outer:
        outer.advance(2)
        with Progress("inner", 2) as inner:
            inner.advance(2)
        logger.info("an event [with brackets]")
        outer.advance(2)
    printed = capsys.readouterr().out
    assert "pack [1]" in printed
    assert "an event [with brackets]" in printed
    assert "pack [1]: 4 images in 0 s" in printed


@pytest.mark.parametrize(
    ("seconds", "words"), [(7.6, "8 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")]
)
def test_durations_are_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_events_are_json_lines_in_order(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run").write_event("stage", name="pack", seconds=1.5)
    RunFolder(tmp_path / "run").write_event("checkpoint", step=200)
    first, second = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert (first["kind"], first["name"], first["seconds"]) == ("stage", "pack", 1.5)
    assert second["kind"] == "checkpoint"
    assert second["step"] == 200
    assert second["time"] >= first["time"]


def test_an_event_after_a_line_that_was_cut_short_has_a_line_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"time": 1, "kind": "tra')
    RunFolder(tmp_path).write_event("stage", name="pack")
    assert json.loads(path.read_text().splitlines()[1])["name"] == "pack"


def test_a_log_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").mkdir()
    with pytest.raises(StorageError, match=r"cannot write .*events\.jsonl"):
        RunFolder(tmp_path).write_event("stage")
