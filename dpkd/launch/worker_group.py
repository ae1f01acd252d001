"""The gang protocol: N processes that train as one; and what becomes of a session when some of them fail."""

import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from dpkd.errors import StopRequested, StorageError, StorageUnavailable, UserError, WorkerFailed, portable
from dpkd.launch.watchdog import COLLECTIVES, Hang, WatchOrder, hangs
from dpkd.log import logger

LONGEST_WAIT_S = 60.0
TWICE_S = 1.0
FOR_MEMORY = " (out of memory?)"


@dataclass(frozen=True)
class Restart:
    """One restart of all workers: whose failure it answers, and the time since."""

    rank: int
    """-1 where no worker failed, as when a node is about to leave the cluster."""
    cause: str
    since_failure_s: float


@dataclass(frozen=True)
class Supervision:
    """What a session goes by beside its work."""

    hangs: Path | None = None
    """Folder that driver and workers see, for reports of workers that hung; without one none is watched."""
    progress: Callable[[], tuple[int, ...]] = tuple
    """How far the session is; restarts are counted anew once it has grown."""
    on_restart: Callable[[Restart], None] = lambda _: None


UNSUPERVISED = Supervision()


class StopRequests:
    """How often this process was asked to stop; `on_signal` is to get the stop signals."""

    def __init__(self) -> None:
        self.count = 0
        self._counted_s = 0.0

    def on_signal(self, number: int, _frame: FrameType | None) -> None:
        """Counts the first signal, and each Ctrl-C after it, but for one that comes twice, as from a wrapper too."""
        now_s = time.monotonic()
        if self.count == 0 or (number == signal.SIGINT and now_s > self._counted_s + TWICE_S):
            self.count += 1
            self._counted_s = now_s


class Gang(Protocol):
    """Starts the workers of a training session, watches them, restarts all when one dies or hangs."""

    def run(self, work: Callable[[Any], None], argument: Any, *, supervision: Supervision = UNSUPERVISED) -> None:
        """Runs `work(argument)` in every worker; both must pickle. RANK, LOCAL_RANK, WORLD_SIZE and MASTER_* are set.

        A stop signal to this process reaches the workers as `world.stop_requested()`; they have a time of grace
        to save and raise `StopRequested`. Call it in the main thread.

        Raises `WorkerFailed` with the first failing rank's traceback once no restart is left, `StopRequested` when the
        workers stopped on request, and passes a `UserError` on without a restart.
        """


@dataclass(frozen=True)
class Failure:
    """How one worker ended: by an error of its own, or, without one, by a signal, an exit or its watchdog."""

    rank: int
    """-1 where it was none of them, as when an actor of Ray's was lost."""
    cause: str
    """The traceback, or what is known of the death."""
    error: Exception | None = None
    time_s: float = field(default_factory=time.time)
    symptom: bool = False
    """Whether it failed in waiting for its peers, most likely because one of them had failed."""

    @classmethod
    def of_error(cls, rank: int, error: Exception) -> "Failure":
        """The failure of a worker that raised; the error is replaced where it does not survive pickling."""
        frames = traceback.extract_tb(error.__traceback__)
        symptom = bool(frames) and COLLECTIVES in frames[-1].filename
        return cls(rank, "".join(traceback.format_exception(error)), portable(error), symptom=symptom)

    @classmethod
    def of_exit_code(cls, rank: int, exit_code: int) -> "Failure":
        """The failure of a worker that died without a word; negative codes are signals."""
        if exit_code < 0:
            name = signal.Signals(-exit_code).name if -exit_code in set(signal.Signals) else f"signal {-exit_code}"
            hint = FOR_MEMORY if exit_code == -signal.SIGKILL else ""
            return cls(rank, f"killed by {name}{hint}")
        return cls(rank, f"exited with code {exit_code}")

    @property
    def who(self) -> str:
        """The worker, or the generation where it was none of them."""
        return f"worker {self.rank}" if self.rank >= 0 else "the session"

    @property
    def line(self) -> str:
        """The failure in one line."""
        text = f"{type(self.error).__name__}: {self.error}" if self.error else self.cause
        return text.splitlines()[0]


def supervise(
    run_once: Callable[[], list[Failure]],
    *,
    max_restarts: int,
    stop_requested: Callable[[], bool],
    supervision: Supervision,
) -> None:
    """Runs generations of workers until one has done its work; `run_once` runs one and returns how workers failed.

    Raises what `verdict` decides. Between generations it waits, longer each time that nothing was gained. Whatever else
    goes wrong in running one, for want of memory or a folder, say, counts as a failure of it.
    """
    furthest = _reached(supervision, ())
    attempts: list[list[Failure]] = []
    while True:
        try:
            failures = run_once()
        except StopRequested:
            raise
        except Exception as error:  # noqa: BLE001  comes out once no restart is left
            failures = [Failure.of_error(-1, error)]
        if not failures:
            return
        reached = _reached(supervision, furthest)
        if reached > furthest:
            furthest, attempts = reached, []
        attempts.append(failures)
        end = verdict(attempts, stop_requested=stop_requested(), max_restarts=max_restarts)
        if end is not None:
            raise end
        first, wait_s = by_cause(failures)[0], waiting_time_s(len(attempts))
        when = f"in {wait_s:.0f} s" if wait_s else "at once"
        logger.info(
            f"{first.who} failed: {first.line}; all start again {when}, "
            f"{max_restarts - len(attempts)} restarts left until there is progress"
        )
        supervision.on_restart(Restart(first.rank, first.line, time.time() - first.time_s))
        _wait(wait_s, stop_requested)


def verdict(attempts: Sequence[Sequence[Failure]], *, stop_requested: bool, max_restarts: int) -> Exception | None:
    """The error that ends a session, or none where its workers should start again.

    `attempts` are the generations since the session last got further, each with the failures that were seen, in no
    order. A user's error or a stop counts whoever raised it: ranks agree before they stop, and an error of the user's
    would come again, but for storage that fails for a while.
    """
    for kind in (UserError, StorageError, StopRequested):
        for failure in attempts[-1]:
            if isinstance(failure.error, kind) and not isinstance(failure.error, StorageUnavailable):
                return failure.error
    if stop_requested:
        first = by_cause(attempts[-1])[0]
        why = first.line.removesuffix(FOR_MEMORY)  # most likely it took too long, and was ended for it
        return StopRequested(
            f"the workers ended before they had saved ({first.who}: {why}); the last checkpoint stands"
        )
    if len(attempts) <= max_restarts:
        return None
    return WorkerFailed(_account(attempts))


def _reached(supervision: Supervision, furthest: tuple[int, ...]) -> tuple[int, ...]:
    """How far the session is, or was when storage last said."""
    try:
        return supervision.progress()
    except OSError:
        return furthest


def by_cause(failures: Sequence[Failure]) -> list[Failure]:
    """Failures, the most likely cause first: what a rank did by itself before what it suffered, each by time."""
    return sorted(failures, key=lambda failure: (failure.symptom, failure.time_s))


def explained(failures: Sequence[Failure], order: WatchOrder | None) -> list[Failure]:
    """The failures of a generation, by what its watchdogs reported, as far as that can be read."""
    try:
        return with_hangs(failures, hangs(order))
    except OSError as error:
        logger.info(f"the reports of hung workers cannot be read: {error}")
        return list(failures)


def with_hangs(failures: Sequence[Failure], reported: Sequence[Hang]) -> list[Failure]:
    """The failures, with the hangs that the watchdogs reported in place of the deaths that they caused."""
    if not reported:
        return list(failures)
    began_s = min(hang.time_s for hang in reported)
    ranks = {hang.rank for hang in reported}
    hung = [Failure(hang.rank, str(hang), time_s=began_s, symptom=hang.waits) for hang in reported]
    others = [each for each in failures if each.rank not in ranks or not (each.error is None or each.symptom)]
    # a death earlier than the hang would have ended the generation before it
    return hung + [replace(each, time_s=max(each.time_s, began_s)) if each.error is None else each for each in others]


def waiting_time_s(num_attempts: int) -> float:
    """Seconds to wait before the next attempt: none after the first failure, then 1, 2, 4 … and a minute at most."""
    return min(LONGEST_WAIT_S, 2.0 ** (num_attempts - 2)) if num_attempts > 1 else 0.0


def _account(attempts: Sequence[Sequence[Failure]]) -> str:
    """The first failure's own words, and in a line each what followed it."""
    first, *others = by_cause(attempts[0])
    lines = [f"{first.who}: {first.cause.rstrip()}"]
    lines += [f"after it {each.who}: {each.line}" for each in others[:1]]
    if len(attempts) > 1:
        last = by_cause(attempts[-1])[0]
        lines.append(
            f"{len(attempts)} attempts failed without getting further; this was the first, "
            f"the last: {last.who}: {last.line}"
        )
    return "\n".join(lines)


def _wait(wait_s: float, stop_requested: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + wait_s
    while not stop_requested():
        if time.monotonic() >= deadline_s:
            return
        time.sleep(0.05)
    raise StopRequested("stopped between two attempts; the last checkpoint stands")
