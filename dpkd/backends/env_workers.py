"""Training workers that another launcher has started, such as torchrun: this process is one of them.

Every process runs the same command. Rank 0 is also the driver: it packs and prepares on its machine while the others
wait, then sends them the task. The launcher starts all again after a failure; they continue from the last checkpoint.
"""

import logging
import os
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist

from dpkd.engine import world
from dpkd.errors import UserError
from dpkd.launch.settings import LauncherSettings
from dpkd.launch.signals import stop_handlers
from dpkd.launch.watchdog import WatchOrder, watched
from dpkd.launch.worker_group import UNSUPERVISED, Supervision, Task
from dpkd.log import logger

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
NEW_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""Makes torchrun start a new store at each restart."""
LONGEST_WAIT = timedelta(days=30)
"""Time for which the other ranks wait while rank 0 packs and prepares."""


class EnvWorkers:
    """The processes that RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* describe, one worker each.

    A context manager: its end tells the other ranks that no task is left. Raises `UserError` if a variable is missing
    or does not fit.
    """

    def __init__(self, settings: LauncherSettings) -> None:
        missing = [name for name in VARIABLES if name not in os.environ]
        if missing:
            raise UserError(
                f"launcher.kind=env: {', '.join(missing)} is not set; start the command with torchrun, which sets "
                f"{', '.join(VARIABLES)}, or set launcher.kind=local"
            )
        if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) and os.environ.get(NEW_STORE) != "1":
            raise UserError(
                "torchrun --max-restarts: restarted workers would find the addresses of the ended ones; set "
                f"{NEW_STORE}=1 in the environment of torchrun"
            )
        size = int(os.environ["WORLD_SIZE"])
        if settings.workers not in (None, size):
            raise UserError(f"launcher.workers={settings.workers}, and WORLD_SIZE={size}: set launcher.workers=null")
        self.size, self._settings = size, settings
        self._world = world.join(timeout_s=settings.peer_timeout_s)
        self._tasks: Any = dist.new_group(backend="gloo", timeout=LONGEST_WAIT) if size > 1 else None
        self.is_driver, self._is_working = self._world.rank == 0, False
        if not self.is_driver:
            logger.setLevel(logging.ERROR)  # rank 0 logs for all

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.is_driver and not self._is_working:  # otherwise the others have failed too
            self._send(None)
        if error is None:
            dist.destroy_process_group()

    def run(self, work: Callable[[Any], None], argument: Any, *, supervision: Supervision = UNSUPERVISED) -> None:
        """Runs the work in all ranks; its errors are raised, and the launcher ends and restarts the other ranks."""
        order = WatchOrder.begin(supervision.hangs, hang_timeout_s=self._settings.hang_timeout_s)
        self._is_working = True
        self._work(self._send(Task(work, argument, order)))
        self._is_working = False

    def follow(self) -> None:
        """Runs the tasks of rank 0 in another rank until none is left."""
        while (task := self._send(None)) is not None:
            self._work(task)

    def _send(self, task: Task | None) -> Any:
        """The task of rank 0."""
        tasks = [task]
        if self._tasks is not None:
            dist.broadcast_object_list(tasks, src=0, group=self._tasks)
        return tasks[0]

    def _work(self, task: Task) -> None:
        with stop_handlers(lambda *_: world.request_stop()), watched(task.order, rank=self._world.rank):
            task.work(task.argument)
