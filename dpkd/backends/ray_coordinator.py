"""The coordinator: a small actor where the driver and the workers of one generation meet.

It loads neither torch nor Ray Train, so that it starts fast.
"""

import asyncio
import io
import threading
import time
from dataclasses import dataclass, field, replace
from typing import Any

import ray

from dpkd.launch.worker_group import Failure


@dataclass(frozen=True)
class Status:
    """What the coordinator knows about the workers."""

    output: str = ""
    """Of the first one, since the last status."""
    node_of: dict[int, str] = field(default_factory=dict)
    """By rank, of those that are at work."""
    done: set[int] = field(default_factory=set)
    failures: list[Failure] = field(default_factory=list)


class Coordinator:
    """The actor's class."""

    def __init__(self) -> None:
        self._status = Status()
        self._stop = asyncio.Event()

    async def enter(self, rank: int, node: str) -> None:
        """Notes that a worker is at work, on this node."""
        self._status.node_of[rank] = node

    async def done(self, rank: int) -> None:
        """Notes that a worker has done its work."""
        self._status.done.add(rank)

    async def fail(self, failure: Failure) -> None:
        """Takes a worker's failure, at the time by this clock: those of the nodes differ."""
        self._status.failures.append(replace(failure, time_s=time.time()))

    async def write(self, text: str) -> None:
        """Takes output of the first worker."""
        self._status = replace(self._status, output=self._status.output + text)

    async def status(self) -> Status:
        """How far the workers are, and the first one's output since the last call."""
        status, self._status = self._status, replace(self._status, output="")
        return status

    async def stop(self) -> None:
        """Asks the workers to stop."""
        self._stop.set()

    async def wait_for_stop(self) -> None:
        """Waits for a request to stop."""
        await self._stop.wait()


class Output(io.TextIOBase):
    """Standard output of the first worker: whole lines go to the coordinator."""

    def __init__(self, coordinator: Any) -> None:
        self._coordinator = coordinator
        self._part = ""
        self._lock = threading.Lock()

    def write(self, text: str) -> int:
        """Takes text; sends it on at the end of a line."""
        with self._lock:
            lines, newline, self._part = (self._part + text).rpartition("\n")
            if newline:
                self._coordinator.write.remote(lines + newline)
        return len(text)

    def close(self) -> None:
        """Sends what is left, and waits until it has arrived."""
        with self._lock:
            ray.get(self._coordinator.write.remote(self._part))
            self._part = ""
