"""The life of a worker of a Ray gang, which runs in a thread of Ray's."""

import contextlib
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
import torch

from dpkd.backends.ray_post import Output, asked
from dpkd.backends.ray_session import enter_folder
from dpkd.engine import world
from dpkd.launch.watchdog import WatchOrder, watched
from dpkd.launch.worker_group import Failure

CAUSE_PATIENCE_S = 2.0
EXIT_STOPPED = 75


@dataclass(frozen=True)
class Task:
    """What the workers of a generation are to do."""

    work: Callable[[Any], None]
    argument: Any
    post: Any
    folder: str
    """The driver's working folder."""
    threads: int | None
    order: WatchOrder | None


def enter(config: dict[str, Any]) -> None:
    """Runs the `task` of the config as the rank that Ray Train gave this process."""
    task: Task = config["task"]
    enter_folder(task.folder)
    if task.threads is not None:
        torch.set_num_threads(task.threads)
    rank = int(os.environ["RANK"])
    asked(task.post.enter.remote(rank, ray.get_runtime_context().get_node_id()))
    threading.Thread(target=_heed_stop, args=(task.post,), daemon=True).start()
    output = Output(task.post)
    with contextlib.redirect_stdout(output) if rank == 0 else contextlib.nullcontext():
        try:
            with watched(task.order, rank=rank):
                _work(task, rank)
        finally:
            output.close()


def _work(task: Task, rank: int) -> None:
    """Does the work, and says how it ended."""
    try:
        task.work(task.argument)
    except Exception as error:  # crosses to the driver too
        asked(task.post.fail.remote(Failure.of_error(rank, error)))
        # Ray Train ends all once one has raised: the peer that caused this shall tell of it first
        ray.wait([task.post.until_cause.remote()], timeout=CAUSE_PATIENCE_S)
        raise
    asked(task.post.done.remote(rank))


def _heed_stop(post: Any) -> None:
    """Waits for the driver's request to stop, then for the time of grace, then ends this process."""
    grace_s = ray.get(post.until_stop.remote())
    world.request_stop()
    ray.wait([post.until_end.remote()], timeout=grace_s)
    os._exit(EXIT_STOPPED)
