"""The coordinator: a small actor that connects the driver and the workers of one generation.

It loads neither torch nor Ray Train, so it starts fast.
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
    """The status of the workers."""

    output: str = ""
    """Output of the first worker since the last status."""
    node_of: dict[int, str] = field(default_factory=dict)
    """Node of each started worker, by rank."""
    done: set[int] = field(default_factory=set)
    failures: list[Failure] = field(default_factory=list)


class Coordinator:
    """The class of the actor."""

    def __init__(self) -> None:
        self._status = Status()
        self._stop = asyncio.Event()

    async def enter(self, rank: int, node: str) -> None:
        """Records that a worker has started on a node."""
        self._status.node_of[rank] = node

    async def done(self, rank: int) -> None:
        """Records that a worker has finished its work."""
        self._status.done.add(rank)

    async def fail(self, failure: Failure) -> None:
        """Records a worker's failure with the time of this actor's clock, because the clocks of nodes differ."""
        self._status.failures.append(replace(failure, time_s=time.time()))

    async def write(self, text: str) -> None:
        """Adds output of the first worker."""
        self._status = replace(self._status, output=self._status.output + text)

    async def status(self) -> Status:
        """The status of the workers, with the output of the first one since the last call."""
        status, self._status = self._status, replace(self._status, output="")
        return status

    async def stop(self) -> None:
        """Asks the workers to stop."""
        self._stop.set()

    async def wait_for_stop(self) -> None:
        """Waits for a request to stop."""
        await self._stop.wait()


class Output(io.TextIOBase):
    """Standard output of the first worker, which sends whole lines to the coordinator."""

    def __init__(self, coordinator: Any) -> None:
        self._coordinator = coordinator
        self._part = ""
        self._lock = threading.Lock()

    def write(self, text: str) -> int:
        """Buffers text, and sends whole lines."""
        with self._lock:
            lines, newline, self._part = (self._part + text).rpartition("\n")
            if newline:
                self._coordinator.write.remote(lines + newline)
        return len(text)

    def close(self) -> None:
        """Sends the rest of the text, and waits until it has arrived."""
        with self._lock:
            ray.get(self._coordinator.write.remote(self._part))
            self._part = ""
