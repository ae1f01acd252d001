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
        self._failures: list[Failure] = []
        self._output: list[str] = []
        self._node_of: dict[int, str] = {}
        self._done: set[int] = set()
        self._grace_s: float | None = None
        self._at_once = False
        self._changed = asyncio.Condition()

    async def enter(self, rank: int, node: str) -> None:
        """Notes that a worker is at work, on this node."""
        self._node_of[rank] = node

    async def done(self, rank: int) -> None:
        """Notes that a worker has done its work."""
        self._done.add(rank)

    async def write(self, text: str) -> None:
        """Takes output of the first worker."""
        self._output.append(text)

    async def status(self) -> Status:
        """How far the workers are, and the first one's output since the last call."""
        output = "".join(self._output)
        self._output.clear()
        return Status(output, dict(self._node_of), set(self._done), list(self._failures))

    async def stop(self, grace_s: float) -> None:
        """Asks the workers to stop within a time; once asked, they keep the time that they were given."""
        async with self._changed:
            if self._grace_s is None:
                self._grace_s = grace_s
            self._changed.notify_all()

    async def end(self) -> None:
        """Asks the workers to end at once."""
        async with self._changed:
            self._grace_s, self._at_once = self._grace_s or 0.0, True
            self._changed.notify_all()

    async def wait_for_stop(self) -> float:
        """Waits for a request to stop; returns its grace period in seconds."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._grace_s is not None)
        assert self._grace_s is not None
        return self._grace_s

    async def wait_for_end(self) -> None:
        """Waits for a request to end at once."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._at_once)

    async def fail(self, failure: Failure) -> None:
        """Takes a worker's failure, at the time by this clock: those of the nodes differ."""
        async with self._changed:
            self._failures.append(replace(failure, time_s=time.time()))
            self._changed.notify_all()

    async def wait_for_cause(self) -> None:
        """Waits for a failure that is no symptom of another."""
        async with self._changed:
            await self._changed.wait_for(lambda: any(not failure.symptom for failure in self._failures))


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
