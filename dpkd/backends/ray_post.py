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
    """An actor that the driver and the workers meet at."""

    def __init__(self) -> None:
        self._failures: list[Failure] = []
        self._output: list[str] = []
        self._nodes: set[str] = set()
        self._stop_by_s: float | None = None
        self._changed = asyncio.Condition()

    async def begin(self) -> None:
        """Forgets the generation before: its failures, its nodes, what it was asked."""
        self._failures.clear()
        self._nodes.clear()
        self._stop_by_s = None

    async def enter(self, node: str) -> None:
        """Takes the node that a worker runs on."""
        self._nodes.add(node)

    async def nodes(self) -> set[str]:
        """The nodes that have a worker."""
        return self._nodes

    async def stop(self, grace_s: float) -> None:
        """Asks the workers to stop within a time."""
        async with self._changed:
            self._stop_by_s = grace_s
            self._changed.notify_all()

    async def until_stop(self, known: float | None) -> float:
        """Waits for a request to stop other than `known`; returns its time of grace in seconds."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._stop_by_s not in {None, known})
        assert self._stop_by_s is not None
        return self._stop_by_s

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
