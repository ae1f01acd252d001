"""Signs of life of a worker, in memory that it shares with its watchdog: some microseconds each, and no disk."""

import mmap
import os
import struct
import threading
import time
from dataclasses import dataclass

STEADY = "train"
"""The phase that has one heartbeat a step. Every other one may take `SLOW` times as long."""
SLOW = 6
RESTING = "rest"
"""The phase of a worker that waits for work. It may take any time, unless the process is stopped."""

_LAYOUT = struct.Struct("=QQQQQ16s")
SIZE = _LAYOUT.size


@dataclass(frozen=True)
class Heartbeat:
    """The last sign of life of a worker."""

    pulses: int
    """Grows with every sign of life."""
    beats: int
    """Grows at the places that every rank passes, so that it shows which rank is behind."""
    allowance: int
    """How many hang timeouts may pass until the next sign."""
    step: int
    thread: int
    """Python's number of the thread that gave it."""
    phase: str

    @classmethod
    def read(cls, memory: bytes) -> "Heartbeat":
        """The heartbeat in the first `SIZE` bytes of the memory."""
        pulses, beats, allowance, step, thread, phase = _LAYOUT.unpack(memory[:SIZE])
        return cls(pulses, beats, allowance, step, thread, phase.rstrip(b"\0").decode())


class RunClock:
    """The seconds for which this process ran: a pause of it, or of the whole machine, counts little."""

    def __init__(self, tick_s: float) -> None:
        self._tick_s, self._checked_s = tick_s, time.monotonic()

    def passed_s(self) -> float:
        """Seconds since the last call, which comes every tick or so, and no more than two ticks."""
        before_s, self._checked_s = self._checked_s, time.monotonic()
        return min(self._checked_s - before_s, 2 * self._tick_s)


class _Writer:
    def __init__(self, memory: mmap.mmap | bytearray) -> None:
        self._memory = memory
        self._process = os.getpid()
        self._pulses = self._beats = 0
        self._phase_before = ""
        self.beat("start", step=0)

    def beat(self, phase: str, *, step: int) -> None:
        # a peer may still be in the phase before, and this rank waits for it in the next one
        is_steady = phase == self._phase_before == STEADY
        self._beats += 1
        self._rest = (self._beats, 1 if is_steady else SLOW, step, threading.get_ident(), phase.encode())
        self._phase_before = phase
        self.pulse()

    def pulse(self) -> None:
        if os.getpid() == self._process:  # not a process that was forked from it
            self._pulses += 1
            _LAYOUT.pack_into(self._memory, 0, self._pulses, *self._rest)


_writer = _Writer(bytearray(SIZE))


def heartbeat(phase: str, *, step: int = 0) -> None:
    """Shows that this worker lives and enters a phase (16 characters); every rank calls it at the same places."""
    _writer.beat(phase, step=step)


def pulse() -> None:
    """Shows that this worker lives, inside a phase; ranks may differ in how often they call it."""
    _writer.pulse()


def send_to(memory: mmap.mmap | None) -> None:
    """Sends the heartbeats of this process to the memory, of `SIZE` bytes or more, or nowhere."""
    global _writer  # noqa: PLW0603  one a process, as there is one stop flag
    _writer = _Writer(bytearray(SIZE) if memory is None else memory)
