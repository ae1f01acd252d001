"""The worker group protocol: N processes that train as one, and start again after a failure."""

import signal
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from dpkd.errors import StopRequested, StorageError, StorageUnavailable, UserError, WorkerFailed, portable
from dpkd.launch.settings import LauncherSettings
from dpkd.launch.signals import stop_handlers
from dpkd.launch.watchdog import COLLECTIVES, Hang, WatchOrder, read_hangs
from dpkd.log import logger

LONGEST_WAIT_S = 60.0
REPEATED_SIGNAL_S = 1.0
FOR_MEMORY = " (out of memory?)"


@dataclass(frozen=True)
class Restart:
    """One restart of all workers: whose failure it answers, and the time since."""

    rank: int
    """-1 if no worker failed, as when a node is about to leave the cluster."""
    cause: str
    since_failure_s: float


@dataclass(frozen=True)
class Supervision:
    """What the driver knows about a session: the folder for hangs, the progress, what to do at a restart."""

    hangs: Path | None = None
    """Folder that driver and workers see, for reports of workers that hung; without one none is watched."""
    progress: Callable[[], tuple[int, ...]] = tuple
    """How far the session is. Restarts count from 0 again once it has grown."""
    on_restart: Callable[[Restart], None] = lambda _: None


UNSUPERVISED = Supervision()


class StopRequests:
    """How often this process was asked to stop; `on_signal` is to get the stop signals."""

    def __init__(self) -> None:
        self.count = 0
        self._counted_s = 0.0

    def on_signal(self, number: int, _frame: FrameType | None) -> None:
        """Counts the first signal, and each Ctrl-C after it, except a copy of the last one, as wrappers send it."""
        now_s = time.monotonic()
        if self.count == 0 or (number == signal.SIGINT and now_s > self._counted_s + REPEATED_SIGNAL_S):
            self.count += 1
            self._counted_s = now_s


class WorkerGroup(Protocol):
    """Starts the workers of a training session, watches them, restarts all when one dies or hangs."""

    def run(self, work: Callable[[Any], None], argument: Any, *, supervision: Supervision = UNSUPERVISED) -> None:
        """Runs `work(argument)` in every worker; both must pickle. RANK, LOCAL_RANK, WORLD_SIZE and MASTER_* are set.

        A stop signal to this process reaches the workers as `world.stop_requested()`; they have a grace period
        to save and raise `StopRequested`. Call it in the main thread.

        Raises `WorkerFailed` with the first failing rank's traceback once no restart is left, `StopRequested` when the
        workers stopped on request, and passes a `UserError` on without a restart.
        """


@dataclass(frozen=True)
class Failure:
    """How one worker ended: by an error of its own, or, without one, by a signal, an exit or its watchdog."""

    rank: int
    """-1 if it was none of them, as when an actor of Ray's was lost."""
    cause: str
    """The traceback, or what is known about the death."""
    error: Exception | None = None
    time_s: float = field(default_factory=time.time)
    symptom: bool = False
    """Whether it failed while waiting for its peers, most likely because one of them had failed."""

    @classmethod
    def of_error(cls, rank: int, error: Exception) -> "Failure":
        """The failure of a worker that raised; the error is replaced where it does not survive pickling."""
        frames = traceback.extract_tb(error.__traceback__)
        symptom = bool(frames) and COLLECTIVES in frames[-1].filename
        return cls(rank, "".join(traceback.format_exception(error)), portable(error), symptom=symptom)

    @property
    def who(self) -> str:
        """The worker, or the session if it was none of them."""
        return f"worker {self.rank}" if self.rank >= 0 else "the session"

    @property
    def line(self) -> str:
        """The failure in one line."""
        text = f"{type(self.error).__name__}: {self.error}" if self.error else self.cause
        return text.splitlines()[0]


@dataclass(frozen=True)
class Task:
    """What the workers of one generation are to do, and how they are watched."""

    work: Callable[[Any], None]
    argument: Any
    order: WatchOrder | None


def run_with_restarts(
    run_once: Callable[[Task, StopRequests], list[Failure] | Restart],
    work: Callable[[Any], None],
    argument: Any,
    *,
    settings: LauncherSettings,
    supervision: Supervision,
) -> None:
    """Runs generations of workers until one has done its work, and answers the stop signals meanwhile.

    `run_once` runs one; it returns how workers failed, or why all saved and start again. Any other error of it, such
    as too little memory, counts as a failure. Raises what `wait_before_restart` does.
    """
    furthest: tuple[int, ...] = ()
    with suppress(OSError):  # storage that fails says nothing about progress
        furthest = supervision.progress()
    attempts: list[list[Failure]] = []
    stop = StopRequests()
    with stop_handlers(stop.on_signal):
        while True:
            order = WatchOrder.begin(supervision.hangs, hang_timeout_s=settings.hang_timeout_s)
            try:
                failures = run_once(Task(work, argument, order), stop)
            except StopRequested:
                raise
            except Exception as error:  # noqa: BLE001  comes out once no restart is left
                failures = [Failure.of_error(-1, error)]
            if isinstance(failures, Restart):
                logger.info(f"{failures.cause}; all saved and start again")
                supervision.on_restart(failures)
                continue
            if not failures:
                return
            with suppress(OSError):
                failures = with_hangs(failures, read_hangs(order))
            with suppress(OSError):
                reached = supervision.progress()
                if reached > furthest:
                    furthest, attempts = reached, []
            attempts.append(failures)
            wait_s = wait_before_restart(attempts, max_restarts=settings.max_restarts, stop_requested=stop.count > 0)
            first = by_cause(failures)[0]
            logger.info(
                f"{first.who} failed: {first.line}; all start again {f'in {wait_s:.0f} s' if wait_s else 'at once'}, "
                f"{settings.max_restarts - len(attempts)} restarts left until there is progress"
            )
            supervision.on_restart(Restart(first.rank, first.line, time.time() - first.time_s))
            deadline_s = time.monotonic() + wait_s
            while not stop.count and time.monotonic() < deadline_s:
                time.sleep(0.05)
            if stop.count:
                raise StopRequested("stopped between two attempts; the last checkpoint is kept")


def wait_before_restart(attempts: Sequence[Sequence[Failure]], *, max_restarts: int, stop_requested: bool) -> float:
    """Seconds to wait before all start again: none after the first failure, then 1, 2, 4 … and a minute at most.

    `attempts` are the generations since the session last got further, each with its failures, in any order. Raises
    the error that ends the session: a user's error or a stop, whichever rank raised it (ranks agree before they stop,
    and a user's error would come again, unless it is storage that fails for a while); `StopRequested` where workers
    were to stop and did not save; `WorkerFailed` after more than `max_restarts`.
    """
    for kind in (UserError, StorageError, StopRequested):
        for failure in attempts[-1]:
            if isinstance(failure.error, kind) and not isinstance(failure.error, StorageUnavailable):
                raise failure.error
    first, *others = by_cause(attempts[0])
    last = by_cause(attempts[-1])[0]
    if stop_requested:
        why = last.line.removesuffix(FOR_MEMORY)  # most likely it took too long, and was ended for it
        raise StopRequested(f"the workers ended before they had saved ({last.who}: {why}); the last checkpoint is kept")
    if len(attempts) <= max_restarts:
        return min(LONGEST_WAIT_S, 2.0 ** (len(attempts) - 2)) if len(attempts) > 1 else 0.0
    lines = [f"{first.who}: {first.cause.rstrip()}"]
    lines += [f"after it {other.who}: {other.line}" for other in others[:1]]
    if len(attempts) > 1:
        lines.append(
            f"{len(attempts)} attempts failed without getting further; this was the first, "
            f"the last: {last.who}: {last.line}"
        )
    raise WorkerFailed("\n".join(lines))


def late_start(timeout_s: float) -> str:
    """The cause that is given for a worker which was not at work in time."""
    return (
        f"not at work {timeout_s:.0f} s after it was started. Is the machine busy? launcher.start_timeout_s gives "
        "workers more time"
    )


def by_cause(failures: Sequence[Failure]) -> list[Failure]:
    """Failures, the most likely cause first: a rank's own errors before symptoms, both by time."""
    return sorted(failures, key=lambda failure: (failure.symptom, failure.time_s))


def with_hangs(failures: Sequence[Failure], hangs: Sequence[Hang]) -> list[Failure]:
    """The failures, with hangs in place of the deaths that they caused."""
    if not hangs:
        return list(failures)
    began_s = min(hang.time_s for hang in hangs)
    ranks = {hang.rank for hang in hangs}
    explained = [Failure(hang.rank, str(hang), time_s=began_s, symptom=hang.waits) for hang in hangs]
    for failure in failures:
        if failure.error is None and failure.rank not in ranks:
            # a death earlier than the hang would have ended the generation before it
            explained.append(replace(failure, time_s=max(failure.time_s, began_s)))
        elif failure.error is not None and not (failure.symptom and failure.rank in ranks):
            explained.append(failure)
    return explained
