"""The post: a small actor that the driver and the workers of a Ray gang meet at. Loads neither torch nor Ray Train."""

import asyncio
import io
import threading
import time
from dataclasses import replace
from typing import Any

import ray

from dpkd.gang import Failure


class Post:
    """An actor that the driver and the workers of one generation meet at."""

    def __init__(self) -> None:
        self._failures: list[Failure] = []
        self._output: list[str] = []
        self._node_of: dict[int, str] = {}
        self._grace_s: float | None = None
        self._at_once = False
        self._changed = asyncio.Condition()

    async def enter(self, rank: int, node: str) -> None:
        """Takes the node that a worker runs on."""
        self._node_of[rank] = node

    async def entered(self) -> dict[int, str]:
        """The node of each worker that is at work, by rank."""
        return self._node_of

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

    async def until_stop(self) -> float:
        """Waits for a request to stop; returns its time of grace in seconds."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._grace_s is not None)
        assert self._grace_s is not None
        return self._grace_s

    async def until_end(self) -> None:
        """Waits for a request to end at once."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._at_once)

    async def fail(self, failure: Failure) -> None:
        """Takes a worker's failure, at the time by this clock: those of the nodes differ."""
        async with self._changed:
            self._failures.append(replace(failure, time_s=time.time()))
            self._changed.notify_all()

    async def until_cause(self) -> None:
        """Waits for a failure that is no symptom of another."""
        async with self._changed:
            await self._changed.wait_for(lambda: any(not failure.symptom for failure in self._failures))

    async def failures(self) -> list[Failure]:
        """The failures of this generation."""
        return self._failures

    async def write(self, text: str) -> None:
        """Takes output of the first worker."""
        self._output.append(text)

    async def take_output(self) -> str:
        """The output since the last call."""
        text = "".join(self._output)
        self._output.clear()
        return text


class Output(io.TextIOBase):
    """Standard output of the first worker: whole lines go to the post."""

    def __init__(self, post: Any) -> None:
        self._post = post
        self._part = ""
        self._lock = threading.Lock()

    def write(self, text: str) -> int:
        """Takes text; sends it on at the end of a line."""
        with self._lock:
            lines, newline, self._part = (self._part + text).rpartition("\n")
            if newline:
                self._post.write.remote(lines + newline)
        return len(text)

    def close(self) -> None:
        """Sends what is left, and waits until it has arrived."""
        with self._lock:
            ray.get(self._post.write.remote(self._part))
            self._part = ""
