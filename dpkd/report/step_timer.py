"""What the time in the training loop is spent on, measured on rank 0 and told once a log interval and at each save.

`dpkd.report.goodput` makes the account of the run from it. What is not measured here is training.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, Protocol

from dpkd.errors import StopRequested

Interruption = Literal["data_wait", "checkpoint", "evaluation"]
INTERRUPTIONS: tuple[Interruption, ...] = ("data_wait", "checkpoint", "evaluation")


class Tell(Protocol):
    """Takes an event of the loop."""

    def __call__(self, kind: str, *, step: int, **numbers: float | bool) -> None:
        """`kind` is `loop_began`, `spent` or `loop_ended`; see `dpkd.report.goodput`."""


def tell_nobody(kind: str, *, step: int, **numbers: float | bool) -> None:
    """Drops it: what the other ranks do."""


class Spending:
    """Where the time of one pass through the loop goes."""

    def __init__(self, tell: Tell = tell_nobody) -> None:
        self._tell = tell
        self._seconds = dict.fromkeys(INTERRUPTIONS, 0.0)
        self._done = 0
        self._told_first = False

    @contextmanager
    def loop(self, start_step: int) -> Iterator[None]:
        """What happens inside is the loop, from `start_step` on."""
        self._done = start_step
        self._tell("loop_began", step=start_step)
        try:
            yield
        except StopRequested:
            self._say("loop_ended", self._done, finished=False)
            raise
        except BaseException:
            self._say("loop_ended", self._done + 1, finished=False)  # in the middle of a step
            raise
        self._say("loop_ended", self._done, finished=True)

    @contextmanager
    def on(self, what: Interruption) -> Iterator[None]:
        """What happens inside is no training."""
        began_s = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[what] += time.perf_counter() - began_s

    def after_step(self, done: int, *, due: bool) -> None:
        """Step number `done` has ended; tells what was spent where that is due, and after the first step."""
        self._done = done
        if due or not self._told_first:
            self._told_first = True
            self._say("spent", done)

    def _say(self, kind: str, step: int, **facts: bool) -> None:
        spent = {f"{what}_s": round(seconds, 4) for what, seconds in self._seconds.items()}
        self._seconds = dict.fromkeys(INTERRUPTIONS, 0.0)
        self._tell(kind, step=step, **facts, **spent)
