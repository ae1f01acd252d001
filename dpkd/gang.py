"""The gang protocol: N processes that train as one."""

from collections.abc import Callable
from typing import Any, Protocol


class Gang(Protocol):
    """Starts the workers of a training session, watches them, restarts all when one dies."""

    num_workers: int

    def run(self, work: Callable[[Any], None], argument: Any) -> None:
        """Runs `work(argument)` in every worker; both must pickle. Workers find RANK, LOCAL_RANK, WORLD_SIZE and MASTER_* set.

        Raises `WorkerFailed` with the first failing rank's traceback once no restart is left, `StopRequested` when the
        workers stopped on request, and passes a `UserError` on without a restart.
        """
