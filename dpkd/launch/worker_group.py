"""The worker group protocol: N processes that train together, and restart together after a failure."""

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
    """One restart of all workers: the failed rank, the cause, and the time since the failure."""

    rank: int
    """-1 if no worker failed, for example if a node is about to leave the cluster."""
    cause: str
    since_failure_s: float


@dataclass(frozen=True)
class Supervision:
    """The driver's side of a session: the folder for reports of hangs, the progress, a callback for restarts."""

    hangs: Path | None = None
    """Folder for reports of hangs, which driver and workers see; None means no watchdogs."""
    progress: Callable[[], tuple[int, ...]] = tuple
    """The progress of the session. An increase sets the count of restarts to 0."""
    on_restart: Callable[[Restart], None] = lambda _: None


UNSUPERVISED = Supervision()


class StopRequests:
    """The number of requests to stop this process; `on_signal` must get the stop signals."""

    def __init__(self) -> None:
        self.count = 0
        self._counted_s = 0.0

    def on_signal(self, number: int, _frame: FrameType | None) -> None:
        """Counts the first signal and each later Ctrl-C, except a copy of the last one, which some wrappers send."""
        now_s = time.monotonic()
        if self.count == 0 or (number == signal.SIGINT and now_s > self._counted_s + REPEATED_SIGNAL_S):
            self.count += 1
            self._counted_s = now_s


class WorkerGroup(Protocol):
    """Starts and watches the workers of a training session, and restarts all if one dies or hangs."""

    def run(self, work: Callable[[Any], None], argument: Any, *, supervision: Supervision = UNSUPERVISED) -> None:
        """Runs `work(argument)` in every worker; both must be picklable. Sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_*.

        A stop signal to this process reaches the workers as `world.stop_requested()`; they have a grace period
        to save and raise `StopRequested`. Call it in the main thread.

        Raises `WorkerFailed` with the traceback of the rank that failed first if no restart is left, `StopRequested`
        if the workers stopped on request, and a `UserError` of a worker without a restart.
        """


@dataclass(frozen=True)
class Failure:
    """The failure of one worker: an error that it raised, or a signal, an exit or its watchdog."""

    rank: int
    """-1 if no worker failed, for example if an actor of Ray was lost."""
    cause: str
    """The traceback, or the known facts of the death."""
    error: Exception | None = None
    time_s: float = field(default_factory=time.time)
    symptom: bool = False
    """Whether it failed while it waited for its peers, most likely after the failure of a peer."""

    @classmethod
    def of_error(cls, rank: int, error: Exception) -> "Failure":
        """The failure of a worker that raised `error`; an error that cannot be pickled is replaced."""
        frames = traceback.extract_tb(error.__traceback__)
        symptom = bool(frames) and COLLECTIVES in frames[-1].filename
        return cls(rank, "".join(traceback.format_exception(error)), portable(error), symptom=symptom)

    @property
    def who(self) -> str:
        """The worker, or the session if no worker failed."""
        return f"worker {self.rank}" if self.rank >= 0 else "the session"

    @property
    def line(self) -> str:
        """The failure in one line."""
        text = f"{type(self.error).__name__}: {self.error}" if self.error else self.cause
        return text.splitlines()[0]


@dataclass(frozen=True)
class Task:
    """The work of the workers of one generation, and the order of their watchdogs."""

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
    """Runs generations of workers until one has finished its work; handles the stop signals meanwhile.

    `run_once` runs one generation; it returns the failures, or the cause of a restart after all workers have saved.
    Its other errors, such as too little memory, count as failures. Raises the errors of `wait_before_restart`.
    """
    furthest: tuple[int, ...] = ()
    with suppress(OSError):  # if storage fails, the progress is unknown
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
            except Exception as error:  # noqa: BLE001 (raised if no restart is left)
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
    """Seconds to wait before all workers restart: 0 after the first failure, then 1, 2, 4 … and at most 60.

    `attempts` are the generations since the last progress of the session, each with its failures, in any order. Raises
    the error that ends the session: a user's error or a stop of any rank (ranks agree before they stop, and a user's
    error would occur again, except a temporary failure of storage); `StopRequested` if workers ended before they saved
    on request; `WorkerFailed` after more than `max_restarts`.
    """
    for kind in (UserError, StorageError, StopRequested):
        for failure in attempts[-1]:
            if isinstance(failure.error, kind) and not isinstance(failure.error, StorageUnavailable):
                raise failure.error
    first, *others = by_cause(attempts[0])
    last = by_cause(attempts[-1])[0]
    if stop_requested:
        cause = last.line.removesuffix(FOR_MEMORY)  # most likely the worker took too long and was killed
        raise StopRequested(
            f"the workers ended before they had saved ({last.who}: {cause}); the last checkpoint is kept"
        )
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
    """The cause of failure of a worker that did not start in time."""
    return (
        f"not at work {timeout_s:.0f} s after it was started. Is the machine busy? launcher.start_timeout_s gives "
        "workers more time"
    )


def by_cause(failures: Sequence[Failure]) -> list[Failure]:
    """Failures with the most likely cause first: symptoms last, otherwise by time."""
    return sorted(failures, key=lambda failure: (failure.symptom, failure.time_s))


def with_hangs(failures: Sequence[Failure], hangs: Sequence[Hang]) -> list[Failure]:
    """The failures, with hangs instead of the deaths that they caused."""
    if not hangs:
        return list(failures)
    began_s = min(hang.time_s for hang in hangs)
    ranks = {hang.rank for hang in hangs}
    explained = [Failure(hang.rank, str(hang), time_s=began_s, symptom=hang.waits) for hang in hangs]
    for failure in failures:
        if failure.error is None and failure.rank not in ranks:
            # a death before the hang would have ended the generation earlier
            explained.append(replace(failure, time_s=max(failure.time_s, began_s)))
        elif failure.error is not None and not (failure.symptom and failure.rank in ranks):
            explained.append(failure)
    return explained
