"""The account of a run's time: its parts add up to the whole, through any log, and go where they belong."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from dpkd.engine.world import World
from dpkd.errors import StopRequested
from dpkd.log import EventReader
from dpkd.report.goodput import INTERRUPTIONS, MEANINGS, TimeAccount
from dpkd.run.folder import RunFolder
from dpkd.train.meter import Meter

BEGAN_MS = 1_764_000_000_000
KINDS = (
    "attempt_began",
    "alive",
    "stage_began",
    "stage_ended",
    "loop_began",
    "spent",
    "loop_ended",
    "restart",
    "train",
)


class Log:
    """The events of a run by hand, seconds since its first event."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def at(self, second: float, kind: str, *, attempt: str = "1", **facts: Any) -> "Log":
        self.events.append({"time": BEGAN_MS / 1000 + second, "kind": kind, "attempt": attempt, **facts})
        return self

    def loop(self, second: float, step: int, **facts: Any) -> "Log":
        return self.at(second, "loop_began", stage="teach", step=step, **facts)

    def spent(self, second: float, step: int, **facts: Any) -> "Log":
        return self.at(second, "spent", stage="teach", step=step, **facts)


def seconds(found: TimeAccount) -> dict[str, float]:
    """The categories that took time."""
    return {name: ms / 1000 for name, ms in found.milliseconds.items() if ms}


def started() -> Log:
    """Ten steps of a second by second 18: 5 s until the loop, 3 until the first batch is there."""
    log = Log().at(0, "attempt_began").at(2, "stage_began", stage="teach").loop(5, 0)
    return log.spent(9, 1, data_wait_s=3.0).spent(18, 10)


def test_a_run_that_nothing_interrupts() -> None:
    log = Log().at(0, "attempt_began").at(1, "stage_began", stage="pack").at(11, "stage_ended", stage="pack")
    log.at(12, "stage_began", stage="prepare").at(32, "stage_ended", stage="prepare")
    log.at(40, "stage_began", stage="teach").loop(42, 0).spent(45, 1, data_wait_s=2.0, evaluation_s=0.0)
    log.spent(60, 10, data_wait_s=1.5, checkpoint_s=0.25, evaluation_s=4.0)
    log.at(61, "loop_ended", stage="teach", step=10, finished=True, checkpoint_s=1.0)
    log.at(63, "stage_ended", stage="teach").at(63, "stage_began", stage="evaluate").at(70, "stage_ended")
    found = TimeAccount(log.at(71, "attempt_ended", status="done").events)
    assert seconds(found) == {
        "preparation": 30.0,
        "start_up": 1 + 1 + 8 + 2 + 2 + 2 + 1,
        "training": 1 + (15 - 5.75),
        "data_wait": 1.5,
        "checkpoint": 1.25,
        "evaluation": 4 + 7,
    }
    assert (sum(found.milliseconds.values()), found.steps, found.lost_steps) == (71_000, 10, 0)
    assert found.shares["training"] == pytest.approx(10.25 / 71)
    assert found.step_goodput == 1


def test_steps_after_the_checkpoint_that_training_fell_back_to_are_lost_with_the_time_they_took() -> None:
    log = started().spent(28, 20, evaluation_s=2.0).at(35.5, "restart", since_failure_s=1.5)
    log.at(40, "stage_began", stage="teach").loop(42, 10).spent(44, 11, data_wait_s=1.0)
    found = TimeAccount(log.spent(53, 20).events)
    assert seconds(found) == {
        "start_up": 8.0,
        "training": 1 + 9 + 1 + 9,
        "lost_work": 10 + 6,  # up to step 20, and until the failure at 34
        "recovery": 8 + 1,
    }
    assert (found.steps, found.lost_steps, found.restarts) == (20, 10, 1)
    assert found.step_goodput == pytest.approx(20 / 30)


def test_steps_that_were_saved_count_where_the_worker_died_before_it_wrote_of_them() -> None:
    log = started().at(22, "restart", since_failure_s=1).loop(24, 13).spent(26, 14, data_wait_s=1.0)
    found = TimeAccount(log.events)
    assert seconds(found) == {"start_up": 8.0, "training": 1 + 9 + 1, "lost_work": 3.0, "recovery": 1 + 2 + 1}
    assert (found.steps, found.lost_steps) == (14, 0)


def test_a_stage_that_is_gone_back_to_from_its_end_counts_its_steps_once() -> None:
    log = started().at(19, "loop_ended", stage="teach", step=10, finished=True)
    log.at(20, "loop_began", stage="distill", step=0).at(22, "spent", stage="distill", step=5)
    log.loop(25, 10).at(26, "loop_ended", stage="teach", step=10, finished=True)
    assert (TimeAccount(log.events).steps, TimeAccount(log.events).lost_steps) == (15, 0)
    assert (TimeAccount(log.loop(27, 8).events).steps, TimeAccount(log.events).lost_steps) == (13, 2)


def test_a_clock_of_a_worker_that_is_ahead_makes_no_time_negative() -> None:
    found = TimeAccount(started().at(20, "restart", since_failure_s=-30.0).loop(24, 10).spent(26, 11).events)
    assert min(found.milliseconds.values()) >= 0
    assert sum(found.milliseconds.values()) == 26_000


def test_an_attempt_that_was_superseded_before_its_first_event_is_not_listened_to() -> None:
    log = Log().at(0, "attempt_began", attempt="2").at(5, "loop_began", attempt="2", stage="teach", step=0)
    log.at(6, "attempt_began", attempt="1")
    found = TimeAccount(log.at(9, "spent", attempt="2", stage="teach", step=3).events)
    assert (found.steps, found.attempts) == (3, 1)


def test_between_two_attempts_nothing_runs_and_the_next_one_recovers() -> None:
    log = started().at(19, "loop_ended", stage="teach", step=10, finished=False, checkpoint_s=1.0)
    log.at(20, "attempt_ended", status="stopped").at(50, "attempt_began", attempt="2")
    log.loop(54, 10, attempt="2").spent(56, 11, attempt="2", data_wait_s=1.0)
    found = TimeAccount(log.events)
    assert seconds(found) == {"start_up": 8, "training": 11, "checkpoint": 1, "recovery": 1 + 4 + 1, "idle": 30}
    assert (found.attempts, found.lost_steps) == (2, 0)


def test_the_last_sign_of_life_of_a_killed_attempt_is_its_end() -> None:
    log = started().spent(20, 12).at(22, "alive").at(60, "attempt_began", attempt="2").loop(63, 10, attempt="2")
    found = TimeAccount(log.events)
    assert seconds(found) == {"start_up": 8, "training": 1 + 9, "lost_work": 2 + 2, "idle": 38, "recovery": 3}


def test_an_older_attempt_that_still_writes_is_not_listened_to() -> None:
    log = started().at(19, "attempt_began", attempt="2").loop(22, 10, attempt="2")
    log.spent(23, 15).spent(24, 11, attempt="2").spent(30, 30).at(31, "attempt_ended", status="failed")
    log.spent(33, 20, attempt="2").spent(40, 40)
    found = TimeAccount(log.events)
    assert seconds(found) == {"start_up": 8, "training": 1 + 9 + 2 + 9, "recovery": 3, "idle": 1 + 7}
    assert found.steps == 20


def test_a_stage_that_is_evaluated_again_after_a_failure_counts_as_evaluation_and_recovery() -> None:
    log = started().at(18, "loop_ended", stage="teach", step=10, finished=True).at(19, "stage_ended", stage="teach")
    log.at(19, "stage_began", stage="evaluate").at(30, "restart", since_failure_s=1.0)
    log.at(35, "stage_began", stage="evaluate").at(40, "stage_ended", stage="evaluate")
    found = TimeAccount(log.at(40, "attempt_ended", status="done").events)
    assert seconds(found) == {"start_up": 9, "training": 10, "evaluation": 10 + 5, "recovery": 6}


def test_a_clock_that_goes_back_stands_still_until_it_has_caught_up() -> None:
    log = started().spent(8, 20).spent(20, 30)
    found = TimeAccount(log.events)
    assert (sum(found.milliseconds.values()), found.steps) == (20_000, 30)
    assert seconds(found)["training"] == 12


EVENT = st.fixed_dictionaries(
    {
        "after_ms": st.integers(-5_000, 20_000),
        "kind": st.sampled_from((*KINDS, "attempt_ended")),
        "attempt": st.sampled_from(("1", "2", "3")),
        "stage": st.sampled_from(("pack", "teach", "distill", "evaluate")),
        "step": st.integers(0, 40),
        "finished": st.booleans(),
        "status": st.sampled_from(("done", "failed")),
        "since_failure_s": st.floats(-1, 30),
        **{f"{name}_s": st.floats(0, 25) for name in INTERRUPTIONS},
    }
)


@given(st.lists(EVENT, max_size=40))
def test_the_parts_of_any_log_add_up_to_the_time_from_its_first_event_to_its_last(drawn: list[dict[str, Any]]) -> None:
    now_ms, events = BEGAN_MS, []
    for each in drawn:
        now_ms += each["after_ms"]
        facts = {key: value for key, value in each.items() if key != "after_ms"}
        events.append({"time": now_ms / 1000, **facts})
    found = TimeAccount(events)
    times = [round(event["time"] * 1000) for event in events]
    assert sum(found.milliseconds.values()) == (max(times) - times[0] if times else 0)
    assert min(found.milliseconds.values()) >= 0
    assert set(found.milliseconds) == set(MEANINGS)
    assert min(found.steps, found.lost_steps) >= 0
    table = found.table()
    assert round(1000 * sum(table["seconds"].values())) == round(1000 * table["total_s"])


PART = st.integers(0, 5_000)
GENERATION = st.fixed_dictionaries(
    {
        "start": PART,
        "first_wait": PART,
        "intervals": st.lists(st.tuples(st.integers(1, 9), PART, PART, PART, PART), max_size=5),
        "after": PART,
        "ends_by": st.sampled_from(("failure", "stop", "kill")),
        "noticed": PART,
        "gap": PART,
    }
)


@given(st.lists(GENERATION, min_size=1, max_size=5), st.integers(0, 99))
@example([{"start": 7, "first_wait": 0, "intervals": [], "after": 3, "ends_by": "kill", "noticed": 0, "gap": 5}], 0)
def test_every_second_of_a_played_run_goes_where_the_play_spent_it(plays: list[dict[str, Any]], falls: int) -> None:
    """Generations of workers, each ended by a failure, a stop or a kill of all, and continued from some saved step."""
    truth, log, now, attempt = dict.fromkeys(MEANINGS, 0), Log(), 0, 0
    kept: list[tuple[int, int]] = []  # (step reached, what its interval took) of steps that stand
    begins, overhead = True, "start_up"
    for play in plays:
        if begins:
            attempt += 1
            log.at(now / 1000, "attempt_began", attempt=str(attempt))
        now += play["start"]
        truth[overhead] += play["start"]
        stand = falls % (len(kept) + 1)
        truth["lost_work"] += sum(took for _, took in kept[stand:])
        kept = kept[:stand]
        step = kept[-1][0] if kept else 0
        log.loop(now / 1000, step, attempt=str(attempt))
        for place, (steps, trains, waits, saves, looks) in enumerate(play["intervals"]):
            waits = play["first_wait"] if place == 0 else waits  # noqa: PLW2901
            step += steps
            now += trains + waits + saves + looks
            facts = {"data_wait_s": waits / 1000, "checkpoint_s": saves / 1000, "evaluation_s": looks / 1000}
            log.spent(now / 1000, step, attempt=str(attempt), **facts)
            if place == 0:
                truth[overhead] += waits
                kept.append((step, trains + saves + looks))
            else:
                kept.append((step, trains + waits + saves + looks))
        now += play["after"]  # steps that no event tells of
        truth["lost_work" if play["intervals"] else overhead] += play["after"]
        begins, overhead = play["ends_by"] != "failure", "recovery"
        if play["ends_by"] == "failure":
            now += play["noticed"]
            truth["recovery"] += play["noticed"]
            log.at(now / 1000, "restart", attempt=str(attempt), since_failure_s=play["noticed"] / 1000)
        else:
            kind = "alive" if play["ends_by"] == "kill" else "attempt_ended"
            log.at(now / 1000, kind, attempt=str(attempt), status="stopped")
            now += play["gap"]
            truth["idle"] += play["gap"]
    log.at(now / 1000, "attempt_began", attempt="99")
    found = TimeAccount(log.events)
    standing = sum(took for _, took in kept)
    of_loop = sum(found.milliseconds[name] for name in ("training", "data_wait", "checkpoint", "evaluation"))
    assert of_loop == standing
    for name in ("start_up", "recovery", "lost_work", "idle"):
        assert found.milliseconds[name] == truth[name], name
    assert found.steps == (kept[-1][0] if kept else 0)


@pytest.mark.parametrize(
    ("error", "step", "finished"), [(None, 3, True), (StopRequested("asked"), 3, False), (KeyError("mid"), 4, False)]
)
def test_a_meter_reports_where_its_loop_begins_what_it_spent_and_how_it_ends(error, step, finished) -> None:
    events: list[dict[str, Any]] = []
    alone = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))

    def report(kind: str, **facts: Any) -> None:
        events.append({"kind": kind, **facts})

    meter = Meter(world=alone, images_per_step=1, report=report)
    with pytest.raises(type(error)) if error else contextlib.nullcontext(), meter.loop(1):
        for done in (2, 3):
            with meter.interrupted("data_wait"):
                pass
            meter.end_step(done, due=False)
        with meter.interrupted("checkpoint"):
            if error:
                raise error
    assert [(event["kind"], event["step"]) for event in events] == [
        ("loop_began", 1),
        ("spent", 2),
        ("loop_ended", step),
    ]
    assert events[2]["finished"] is finished
    for name in INTERRUPTIONS:
        assert sum(event.get(f"{name}_s", 0) for event in events) == pytest.approx(meter.seconds[name], abs=1e-3)


@given(st.binary(max_size=60), st.integers(0, 30))
def test_a_torn_line_is_left_out_and_the_next_event_stands_on_its_own(tmp_path_factory, rest, cut) -> None:
    path: Path = tmp_path_factory.mktemp("log") / "events.jsonl"
    folder, reader = RunFolder(path.parent, attempt=1), EventReader(path)
    folder.write_event("attempt_began")
    folder.write_event("spent", stage="teach", step=1)
    whole = path.read_bytes()
    os.truncate(path, len(whole) - 2 - cut)
    with path.open("ab") as file:
        file.write(rest.translate(None, b"\n}"))
    RunFolder(path.parent, attempt=2).write_event("attempt_began")
    kinds = [(event["kind"], event["attempt"]) for event in reader.new()]
    assert kinds == [("attempt_began", "1"), ("attempt_began", "2")]
    assert reader.num_torn == 1
    assert reader.new() == []


def test_events_are_read_as_they_come_and_half_a_line_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    reader = EventReader(path)
    assert reader.new() == []
    RunFolder(tmp_path, attempt=1).write_event("attempt_began")
    assert [event["kind"] for event in reader.new()] == ["attempt_began"]
    line = json.dumps({"time": 1, "kind": "alive"}).encode()
    with path.open("ab") as file:
        file.write(line[:9])
    assert reader.new() == []
    with path.open("ab") as file:
        file.write(line[9:] + b"\n")
    assert reader.new() == [{"time": 1, "kind": "alive"}]
    assert reader.num_torn == 0
