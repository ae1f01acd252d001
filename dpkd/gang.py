"""The gang protocol: N processes that train as one; and what becomes of a session when some of them fail."""

import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dpkd.errors import StopRequested, UserError, WorkerFailed, portable


class Gang(Protocol):
    """Starts the workers of a training session, watches them, restarts all when one dies."""

    num_workers: int

    def run(self, work: Callable[[Any], None], argument: Any) -> None:
        """Runs `work(argument)` in every worker; both must pickle. RANK, LOCAL_RANK, WORLD_SIZE and MASTER_* are set.

        A SIGTERM or SIGINT to this process reaches the workers as `world.stop_requested()`; they have a time of grace
        to save and raise `StopRequested`. Call it in the main thread.

        Raises `WorkerFailed` with the first failing rank's traceback once no restart is left, `StopRequested` when the
        workers stopped on request, and passes a `UserError` on without a restart.
        """


@dataclass(frozen=True)
class Failure:
    """How one worker ended: by an error of its own, or, without one, by a signal or an exit."""

    rank: int
    cause: str
    """The traceback, or what is known of the death."""
    error: Exception | None = None
    time_s: float = field(default_factory=time.time)

    @classmethod
    def of_error(cls, rank: int, error: Exception) -> "Failure":
        """The failure of a worker that raised; the error is replaced where it does not survive pickling."""
        return cls(rank, "".join(traceback.format_exception(error)), portable(error))

    @classmethod
    def of_exit_code(cls, rank: int, exit_code: int) -> "Failure":
        """The failure of a worker that died without a word; negative codes are signals."""
        if exit_code < 0:
            name = signal.Signals(-exit_code).name if -exit_code in set(signal.Signals) else f"signal {-exit_code}"
            hint = " (out of memory?)" if exit_code == -signal.SIGKILL else ""
            return cls(rank, f"killed by {name}{hint}")
        return cls(rank, f"exited with code {exit_code}")


def verdict(failures: Sequence[Failure], *, stop_requested: bool, restarts_left: int) -> Exception | None:
    """The error that ends a session whose workers failed so, or none where they should start again.

    `failures` are those that were seen, in no order; peers of the first to fail usually fail after it. A user's error
    or a stop counts whoever raised it: ranks agree before they stop, and an error of the user's would come again.
    """
    for kind in (UserError, StopRequested):
        for failure in failures:
            if isinstance(failure.error, kind):
                return failure.error
    if stop_requested:
        return StopRequested("the workers ended before they had saved; the last checkpoint stands")
    if restarts_left > 0:
        return None
    ordered = sorted(failures, key=lambda failure: failure.time_s)
    return WorkerFailed("\n".join(f"worker {failure.rank}: {failure.cause.rstrip()}" for failure in ordered[:2]))


def summary(failures: Sequence[Failure]) -> str:
    """The first failure in one line."""
    first = min(failures, key=lambda failure: failure.time_s)
    line = f"{type(first.error).__name__}: {first.error}" if first.error else first.cause
    return f"worker {first.rank} failed: {line.splitlines()[0]}"
