"""Where the time of a run went, every second of it, over all attempts: one pure function over the run's events.

An attempt is one submission of the command. Its driver and its first training process (rank 0, which alone measures)
append to `events.jsonl`; these kinds are read here, each with `time` (s) and the `attempt` that wrote it:

    attempt_began, attempt_ended {status: done | stopped | failed}      the driver
    alive                                                               the driver, now and then
    stage_began, stage_ended {stage}                                    the driver for pack and prepare, else rank 0
    loop_began {stage, step}                                            rank 0, where the training loop begins
    spent {stage, step, data_wait_s, checkpoint_s, evaluation_s}        since the event before; the rest was training
    loop_ended {stage, step, finished, data_wait_s, …}                  the same at the end of the loop, if it has one
    restart {since_failure_s}                                           the driver, once a generation of workers failed

What stands between two events is the time of the newest attempt: an older one that still writes is not listened to.
A kill writes nothing, so the last event of an attempt is its end, and what follows is idle.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard, get_args

Category = Literal[
    "training",
    "data_wait",
    "checkpoint",
    "evaluation",
    "preparation",
    "start_up",
    "recovery",
    "lost_work",
    "idle",
]
MEANINGS: dict[Category, str] = {
    "training": "steps that count",
    "data_wait": "waiting for the next batch",
    "checkpoint": "steps held up by a save",
    "evaluation": "looks and panels while training; the stages evaluate and export",
    "preparation": "the stages pack and prepare",
    "start_up": "starting, loading, building networks, and what lies between stages",
    "recovery": "from a failure or stop to the next step: detection, back-off, restart, load",
    "lost_work": "what was done after the checkpoint that training fell back to",
    "idle": "no attempt ran",
}
WORDS: dict[Category, str] = {name: name.replace("_", " ") for name in MEANINGS} | {"start_up": "start-up"}
MEASURED: tuple[Category, ...] = ("checkpoint", "evaluation", "data_wait")
"""What rank 0 measures in the loop; the rest of its time there is training."""
PREPARING, EVALUATING = frozenset({"pack", "prepare"}), frozenset({"evaluate", "export"})

Milliseconds = dict[Category, int]


@dataclass(frozen=True)
class Account:
    """The time of a run by category, in whole milliseconds, so that the parts add up to the whole exactly."""

    milliseconds: Mapping[Category, int]
    steps: int
    """Steps that count."""
    lost_steps: int
    """Steps that were rolled back, as far as the log knows them: it is written once a log interval and at each save."""
    attempts: int
    restarts: int

    @property
    def total_ms(self) -> int:
        """From the first event to the last."""
        return sum(self.milliseconds.values())

    @property
    def shares(self) -> dict[Category, float]:
        """Each category's share of the whole; zeros where no time has passed."""
        return {name: spent / max(1, self.total_ms) for name, spent in self.milliseconds.items()}

    @property
    def time_goodput(self) -> float:
        """Training's share of the run's whole time, everything else included."""
        return self.shares["training"]

    @property
    def step_goodput(self) -> float:
        """Steps that count over all steps that were done, 1 where there are none.

        As the preemption benchmark of Ray Train has it (ray-project/ray, pull request 65047): 1,600 steps that count
        of 2,117 done are 75.6 %, of 1,691 they are 94.6 %. It says nothing of the time that restarts take.
        """
        done = self.steps + self.lost_steps
        return self.steps / done if done else 1.0

    def table(self) -> dict[str, Any]:
        """The content of `goodput.json`."""
        return {
            "total_s": self.total_ms / 1000,
            "seconds": {name: spent / 1000 for name, spent in self.milliseconds.items()},
            "shares": {name: round(share, 5) for name, share in self.shares.items()},
            "time_goodput": round(self.time_goodput, 5),
            "step_goodput": round(self.step_goodput, 5),
            "steps": self.steps,
            "lost_steps": self.lost_steps,
            "attempts": self.attempts,
            "restarts": self.restarts,
        }


def account(events: Iterable[Mapping[str, Any]]) -> Account:
    """The account of a run from its events, in the order in which they were written.

    The parts add up to the time from the first event to the last. A clock that goes back stands still until it has
    caught up. Events without a time or an attempt are passed over; those of other kinds are signs of life. Where an
    attempt is under way, or was killed and not followed, its open loop counts as training: nothing has rolled it back.
    """
    books = Books()
    for event in events:
        books.add(event)
    return books.account()


@dataclass
class _Stretch:
    """A piece of the loop between two events: steps after `start` up to `end`, and what they took."""

    stage: str
    start: int
    end: int
    spent: Milliseconds


@dataclass
class Books:
    """The state of `account` while events come in one by one."""

    _spent: Milliseconds = field(default_factory=lambda: dict.fromkeys(get_args(Category), 0))
    _stretches: list[_Stretch] = field(default_factory=list)
    _lost_steps: int = 0
    _attempts: set[str] = field(default_factory=set)
    _restarts: int = 0
    _attempt: str | None = None
    """The newest attempt, none where it has ended."""
    _unfinished: bool = False
    """Whether the attempt before ended with work left."""
    _now: int | None = None
    _alive: int = 0
    """The last event of the newest attempt."""
    _open: int = 0
    """Up to where all time is accounted."""
    _doing: Category = "idle"
    """What the time since then is for, outside the loop, and in it before its first step."""
    _loop: tuple[str, int] | None = None
    """Stage and step of the loop under way."""
    _first: bool = False
    """Whether its first step is still to come."""

    def add(self, event: Mapping[str, Any]) -> None:
        """Takes the next event."""
        time_s, attempt = event.get("time"), event.get("attempt")
        if not _is_number(time_s) or not isinstance(attempt, str):
            return
        time_ms = round(time_s * 1000)
        if self._now is None:
            self._now = self._open = time_ms
        self._now = max(time_ms, self._now)
        if attempt not in self._attempts:
            if self._attempt is not None and _is_older(attempt, self._attempt):
                return  # it was superseded before it wrote its first
            self._begin(attempt)
        elif attempt != self._attempt:
            return  # superseded, or ended
        self._alive = self._now
        self._take(event)

    def account(self) -> Account:
        """The account up to the last event."""
        spent = dict(self._spent)
        if self._now is not None:
            alive = self._alive if self._attempt is not None else self._open
            spent["training" if self._in_steps else self._doing] += alive - self._open
            spent["idle"] += self._now - alive
        for stretch in self._stretches:
            for name, ms in stretch.spent.items():
                spent[name] += ms
        steps = sum(stretch.end - stretch.start for stretch in self._stretches)
        return Account(spent, steps, self._lost_steps, len(self._attempts), self._restarts)

    @property
    def _in_steps(self) -> bool:
        return self._loop is not None and not self._first

    @property
    def _time(self) -> int:
        assert self._now is not None, "an event sets it"
        return self._now

    def _begin(self, attempt: str) -> None:
        if self._attempt is not None:  # it was killed, or still runs and has been superseded
            self._leave(self._alive)
            self._unfinished = True
        self._close(self._time, "idle")
        self._attempts.add(attempt)
        self._attempt = attempt
        self._doing = "recovery" if self._unfinished else "start_up"

    def _take(self, event: Mapping[str, Any]) -> None:
        kind, stage, step = event.get("kind"), event.get("stage"), event.get("step")
        if kind == "attempt_ended":
            self._end(event)
        elif kind == "restart":
            self._restart(event)
        elif kind in ("stage_began", "stage_ended"):
            self._stage(stage if kind == "stage_began" else None)
        elif kind == "loop_began" and isinstance(stage, str) and _is_count(step):
            self._begin_loop(stage, step)
        elif kind in ("spent", "loop_ended") and isinstance(stage, str) and _is_count(step):
            self._spend(stage, step, event)
            if kind == "loop_ended":
                self._loop = None
                self._doing = "start_up" if event.get("finished") is True else "recovery"

    def _end(self, event: Mapping[str, Any]) -> None:
        self._leave(self._time)
        self._attempt, self._doing, self._unfinished = None, "idle", event.get("status") != "done"

    def _restart(self, event: Mapping[str, Any]) -> None:
        since_s = event.get("since_failure_s")
        self._leave(self._time - (max(0, round(since_s * 1000)) if _is_number(since_s) else 0))
        self._doing = "recovery"
        self._restarts += 1

    def _stage(self, began: str | None) -> None:
        self._leave(self._time)
        if began in PREPARING or began in EVALUATING:
            self._doing = "preparation" if began in PREPARING else "evaluation"
        elif self._doing in ("preparation", "evaluation"):
            self._doing = "start_up"

    def _begin_loop(self, stage: str, start: int) -> None:
        self._leave(self._time)
        self._roll_back(stage, start)
        reached = max((stretch.end for stretch in self._stretches if stretch.stage == stage), default=0)
        if start > reached:  # saved, and the worker died before it wrote of them; their time is booked as lost
            self._stretches.append(_Stretch(stage, reached, start, {}))
        self._loop, self._first = (stage, start), True

    def _close(self, until: int, category: Category) -> None:
        """All time up to `until` was of this category."""
        until = max(until, self._open)
        self._spent[category] += until - self._open
        self._open = until

    def _leave(self, until: int) -> None:
        """Whatever was under way ended at `until`; steps of a loop that nothing tells of are lost."""
        self._close(until, "lost_work" if self._in_steps else self._doing)
        self._loop = None

    def _spend(self, stage: str, step: int, event: Mapping[str, Any]) -> None:
        """Books the loop's time since the event before, up to `step`."""
        if self._loop is None or self._loop[0] != stage or step < self._loop[1]:  # where it began was not written
            self._begin_loop(stage, step)
            self._first = False
            return
        spent: Milliseconds = {}
        left = self._time - self._open
        for name in MEASURED:
            seconds = event.get(f"{name}_s")
            spent[name] = max(0, min(left, round(seconds * 1000))) if _is_number(seconds) else 0
            left -= spent[name]
        if self._first:  # its loader starts with the first batch
            spent[self._doing] = spent.pop("data_wait")
        spent["training"] = left
        self._stretches.append(_Stretch(stage, self._loop[1], step, spent))
        self._open = self._time
        self._loop, self._first = (stage, step), False

    def _roll_back(self, stage: str, start: int) -> None:
        """The stage goes on after step `start`: what was done beyond it is lost."""
        before, self._stretches = self._stretches, []
        for stretch in before:
            if stretch.stage != stage or stretch.end <= start:
                self._stretches.append(stretch)
                continue
            kept = max(0, start - stretch.start)
            length = stretch.end - stretch.start
            if kept:
                share = {name: ms * kept // length for name, ms in stretch.spent.items()}
                self._stretches.append(_Stretch(stage, stretch.start, start, share))
                stretch.spent = {name: ms - share[name] for name, ms in stretch.spent.items()}
            self._lost_steps += length - kept
            for name, ms in stretch.spent.items():
                # what its start took was lost already to the failure before
                self._spent[name if name in ("start_up", "recovery") else "lost_work"] += ms


def _is_older(attempt: str, other: str) -> bool:
    return attempt.isdecimal() and other.isdecimal() and int(attempt) < int(other)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e12


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53
