"""The process group of a training: rank, size, device, communication among ranks, and the request to stop."""

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dpkd.errors import UserError

Thing = TypeVar("Thing")

_stop = threading.Event()


@dataclass(frozen=True)
class World:
    """The processes that train together. All of them call every method together, in the same order."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    control: Any = field(default=None, repr=False)
    """A gloo group for flags and objects, which must not depend on the GPU; None means the default group."""
    release: Callable[[], None] | None = field(default=None, repr=False)
    """Destroys the process group of `join`; None if another program (Ray Train) started the group."""

    def barrier(self) -> None:
        """Waits until every rank has called it."""
        if self.size > 1:
            dist.barrier(group=self.control)

    def any_of(self, *flags: bool) -> tuple[bool, ...]:
        """Whether each flag is true on at least one rank."""
        counts = torch.tensor(flags, dtype=torch.int32)
        if self.size > 1:
            dist.all_reduce(counts, group=self.control)
        return tuple(bool(count) for count in counts)

    def broadcast(self, thing: Thing) -> Thing:
        """The `thing` of rank 0, which must be picklable."""
        things = [thing]
        if self.size > 1:
            dist.broadcast_object_list(things, src=0, group=self.control)
        return things[0]

    def gather(self, thing: Thing) -> list[Thing]:
        """The `thing` of every rank, by rank, on every rank; it must be picklable."""
        things = [thing] * self.size
        if self.size > 1:
            dist.all_gather_object(things, thing, group=self.control)
        return things

    def mean_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replaces `tensor` (on this world's device) with its mean over ranks, and returns it."""
        if self.size > 1:
            dist.all_reduce(tensor)
            tensor.div_(self.size)
        return tensor

    def leave(self) -> None:
        """Destroys the process group if `join` started it."""
        if self.release is not None:
            self.release()


def join(*, timeout_s: float = 1800.0) -> World:
    """Joins the process group that RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* describe; a group of one without them.

    Uses a process group that exists already. Raises `UserError` if this machine has fewer GPUs than workers.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device, timeout = torch.device("cpu"), timedelta(seconds=timeout_s)
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise UserError(
                f"launcher.workers: there is no GPU for worker {local_rank} of this machine, {count} are visible; "
                f"set launcher.workers={count}, or CUDA_VISIBLE_DEVICES= to train on the CPU"
            )
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
    running = dist.is_initialized()
    if not running:
        backend = "nccl" if device.type == "cuda" else "gloo"
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        # a single process needs no port, so several runs on one machine do not conflict
        store = dist.HashStore() if size == 1 else None  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    needs_control = dist.get_world_size() > 1 and dist.get_backend() != "gloo"
    return World(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        local_rank=local_rank,
        device=device,
        control=dist.new_group(backend="gloo", timeout=timeout) if needs_control else None,
        release=None if running else dist.destroy_process_group,
    )


def request_stop() -> None:
    """Sets the stop flag; launchers call it if a signal or a message asks a worker to stop."""
    _stop.set()


def stop_requested() -> bool:
    """Whether this process was asked to stop; ranks agree on it with `World.any_of`."""
    return _stop.is_set()
