"""Where the time of a run goes, every second of it, over all attempts: `TimeAccount` adds up the run's events.

An attempt is one submission of the command. Its driver and its first training process (rank 0, which alone measures)
append to `events.jsonl`. The account reads these kinds, each with `time` (s) and the number of the `attempt`:

    attempt_began, attempt_ended {status: done | stopped | failed}      the driver
    alive                                                               the driver, every 30 s
    restart {since_failure_s}                                           the driver, after a generation of workers failed
    stage_began, stage_ended {stage}                                    the driver for pack and prepare, else rank 0
    loop_began {stage, step}                                            rank 0, where the training loop begins
    spent {stage, step, data_wait_s, checkpoint_s, evaluation_s}        since the event before; the rest was training
    loop_ended {stage, step, finished, data_wait_s, …}                  the same at the end of the loop

The driver reports what a dead worker cannot, and `Meter` in rank 0 its steps. The time between two events belongs to
the newest attempt: what an older one still writes does not count. A kill writes nothing: the last event of an attempt
is its end, and idle time follows.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, get_args

Interruption = Literal["checkpoint", "evaluation", "data_wait"]
INTERRUPTIONS: tuple[Interruption, ...] = get_args(Interruption)
"""What rank 0 measures in the loop; the rest of the loop's time is training."""
Category = Literal[Interruption, "training", "preparation", "start_up", "recovery", "lost_work", "idle"]
MEANINGS: dict[Category, str] = {
    "training": "steps that count",
    "data_wait": "waiting for the next batch",
    "checkpoint": "steps held up by a save",
    "evaluation": "few-shot accuracy and panels while training; the stages evaluate and export",
    "preparation": "the stages pack and prepare",
    "start_up": "starting, loading, building networks, and the time between stages",
    "recovery": "from a failure or stop to the next step: detection, back-off, restart, load",
    "lost_work": "everything after the checkpoint that training fell back to",
    "idle": "no attempt ran",
}
STAGES: dict[str, Category] = {
    "pack": "preparation",
    "prepare": "preparation",
    "evaluate": "evaluation",
    "export": "evaluation",
}
"""What the stages without training count as."""


class Segment(NamedTuple):
    """Steps of a stage after `start` up to `end`, and the milliseconds that they took by category."""

    start: int
    end: int
    spent: Counter[Category]


class TimeAccount:
    """The time of a run by category, in whole milliseconds, so that the parts add up to the whole exactly.

    Takes events in the order written. A clock that goes back stops until it has caught up. The open loop of an attempt
    that runs, or was killed and not followed, counts as training: nothing has rolled it back.
    """

    def __init__(self, events: Iterable[Mapping[str, Any]] = ()) -> None:
        self.attempts = self.restarts = self.lost_steps = 0
        self._segments: dict[str, list[Segment]] = defaultdict(list)  # by stage, from step 0 on, without a gap
        self._spent: Counter[Category] = Counter(dict.fromkeys(MEANINGS, 0))  # all time up to `_open`
        self._doing: Category = "idle"  # what the time since `_open` is for
        self._stage, self._step = "", -1  # the last event's place in the loop under way; -1 outside a loop
        self._attempt, self._running, self._unfinished = 0, False, False  # the newest attempt, and whether it left work
        self._open = self._alive = self._now = 0  # accounted up to; newest attempt's last event; last event (ms)
        self.add(events)

    def add(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Takes the next events; those without an attempt do not count."""
        for event in events:
            if "attempt" not in event:
                continue
            number, self._now = int(event["attempt"]), max(self._now, round(event["time"] * 1000))
            if number > self._attempt:
                if self.attempts == 0:
                    self._open = self._now
                if self._running:  # it was killed, or it still runs and is too old
                    self._leave(self._alive)
                    self._doing = "idle"
                self._leave(self._now)
                self._doing = "recovery" if self._unfinished else "start_up"
                self._attempt, self._running, self._unfinished = number, True, True
                self.attempts += 1
            if number == self._attempt and self._running:  # else a newer attempt has begun, or this one has ended
                self._alive = self._now
                self._take(event)

    @property
    def milliseconds(self) -> dict[Category, int]:
        """The time of each category, up to the last event."""
        alive = self._alive if self._running else self._open
        spent = dict(self._spent)
        spent[self._doing] += alive - self._open
        spent["idle"] += self._now - alive
        return spent

    @property
    def shares(self) -> dict[Category, float]:
        """Each category's share of the whole; that of `training` is the time goodput. Zeros before any time passed."""
        spent = self.milliseconds
        return {name: ms / max(1, sum(spent.values())) for name, ms in spent.items()}

    @property
    def steps(self) -> int:
        """Steps that count, as `lost_steps` those rolled back: as far as the log has them, an event a log interval."""
        return sum(segments[-1].end for segments in self._segments.values() if segments)

    @property
    def step_goodput(self) -> float:
        """Steps that count over all steps that were done, 1 before the first; restarts take no part in it.

        As in the preemption benchmark of Ray Train (ray-project/ray, pull request 65047): 1,600 of 2,117 are 75.6 %.
        """
        done = self.steps + self.lost_steps
        return self.steps / done if done else 1.0

    def table(self) -> dict[str, Any]:
        """The content of `goodput.json`."""
        spent, shares = self.milliseconds, self.shares
        return {
            "total_s": sum(spent.values()) / 1000,
            "seconds": {name: ms / 1000 for name, ms in spent.items()},
            "shares": {name: round(share, 5) for name, share in shares.items()},
            "time_goodput": round(shares["training"], 5),
            "step_goodput": round(self.step_goodput, 5),
            "steps": self.steps,
            "lost_steps": self.lost_steps,
            "attempts": self.attempts,
            "restarts": self.restarts,
        }

    def _take(self, event: Mapping[str, Any]) -> None:
        match event["kind"]:
            case "attempt_ended":
                self._leave(self._now)
                self._doing, self._running, self._unfinished = "idle", False, event["status"] != "done"
            case "restart":
                self._leave(self._now - max(0, round(event["since_failure_s"] * 1000)))
                self._doing, self.restarts = "recovery", self.restarts + 1
            case "stage_began" | "stage_ended" as kind:
                self._leave(self._now)
                if kind == "stage_began" and event["stage"] in STAGES:
                    self._doing = STAGES[event["stage"]]
                elif self._doing != "recovery":
                    self._doing = "start_up"
            case "loop_began":
                self._begin_loop(event["stage"], event["step"])
            case "spent" | "loop_ended":
                self._spend(event)

    def _leave(self, until: int) -> None:
        """What was under way ended at `until`; steps that no event reports are lost."""
        in_steps = self._doing == "training"
        self._spent["lost_work" if in_steps else self._doing] += max(0, until - self._open)
        self._doing = "recovery" if in_steps else self._doing
        self._open, self._step = max(until, self._open), -1

    def _begin_loop(self, stage: str, start: int) -> None:
        """The stage goes on after step `start`: what was done beyond it is lost.

        Each save writes an event, so that a segment is lost as a whole.
        """
        self._leave(self._now)
        self._stage, self._step, segments = stage, start, self._segments[stage]
        while segments and segments[-1].end > start:
            segment = segments.pop()
            self.lost_steps += segment.end - max(start, segment.start)
            lost = {name: ms for name, ms in segment.spent.items() if name not in ("start_up", "recovery")}
            self._spent.subtract(lost)
            self._spent["lost_work"] += sum(lost.values())
        reached = segments[-1].end if segments else 0
        if start > reached:  # saved, but the worker died before it wrote the event; that time counts as lost
            segments.append(Segment(reached, start, Counter()))

    def _spend(self, event: Mapping[str, Any]) -> None:
        """The loop's time since the event before, up to the event's step."""
        stage, step = event["stage"], event["step"]
        if self._step < 0 or stage != self._stage or step < self._step:
            self._begin_loop(stage, step)  # its `loop_began` is missing: a kill tore the line
        left, spent = self._now - self._open, Counter[Category]()
        for interruption in INTERRUPTIONS:
            spent[interruption] = min(left, round(1000 * event.get(f"{interruption}_s", 0.0)))
            left -= spent[interruption]
        spent["training"] = left
        if self._doing != "training":  # the loader starts with the first batch
            spent[self._doing] += spent.pop("data_wait")
        self._spent.update(spent)
        self._segments[stage].append(Segment(self._step, step, spent))
        self._open, self._step, self._doing = self._now, step, "training"
        if event["kind"] == "loop_ended":
            self._step, self._doing = -1, "start_up" if event["finished"] else "recovery"
