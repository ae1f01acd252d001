"""Heartbeats of a worker in memory shared with its watchdog; each takes some microseconds and no disk access."""

import mmap
import os
import struct
import threading
import time
from dataclasses import dataclass

STEADY = "train"
"""The phase with one heartbeat per step. Other phases may take `SLOW` times as long."""
SLOW = 6
RESTING = "rest"
"""The phase of a worker that waits for work. It may take any time, unless a signal has stopped the process."""

_LAYOUT = struct.Struct("=QQQQQ16s")
SIZE = _LAYOUT.size


@dataclass(frozen=True)
class Heartbeat:
    """The last heartbeat or pulse of a worker."""

    pulses: int
    """Number of heartbeats and pulses."""
    beats: int
    """Number of heartbeats. All ranks send the same heartbeats, so the lowest number shows the rank behind."""
    allowance: int
    """Number of hang timeouts that may pass until the next heartbeat or pulse."""
    step: int
    thread: int
    """Python's identifier of the thread that sent it."""
    phase: str

    @classmethod
    def read(cls, memory: bytes) -> "Heartbeat":
        """The heartbeat in the first `SIZE` bytes of the memory."""
        pulses, beats, allowance, step, thread, phase = _LAYOUT.unpack(memory[:SIZE])
        return cls(pulses, beats, allowance, step, thread, phase.rstrip(b"\0").decode())


class RunClock:
    """Counts the seconds for which this process ran; a pause of the process or the machine counts at most two ticks."""

    def __init__(self, tick_s: float) -> None:
        self._tick_s, self._checked_s = tick_s, time.monotonic()

    def passed_s(self) -> float:
        """Seconds since the last call, at most two ticks; call it about once per tick."""
        before_s, self._checked_s = self._checked_s, time.monotonic()
        return min(self._checked_s - before_s, 2 * self._tick_s)


class _Writer:
    """The heartbeats of this process."""

    def __init__(self) -> None:
        self.send_to(None)

    def send_to(self, memory: mmap.mmap | None) -> None:
        """Writes the heartbeats of this process to `memory`, of `SIZE` bytes or more; None discards them."""
        self._memory = bytearray(SIZE) if memory is None else memory
        self._process = os.getpid()
        self._pulses = self._beats = 0
        self._last_phase = ""
        self.beat("start")

    def beat(self, phase: str, *, step: int = 0) -> None:
        """Reports that this worker runs and enters a phase (16 characters); all ranks call it at the same places."""
        # this rank may wait for a peer that is still in the last phase
        is_steady = phase == self._last_phase == STEADY
        self._beats += 1
        self._rest = (self._beats, 1 if is_steady else SLOW, step, threading.get_ident(), phase.encode())
        self._last_phase = phase
        self.pulse()

    def pulse(self) -> None:
        """Reports that this worker runs, within a phase; ranks may call it a different number of times."""
        if os.getpid() == self._process:  # not in a forked process
            self._pulses += 1
            _LAYOUT.pack_into(self._memory, 0, self._pulses, *self._rest)


_writer = _Writer()
heartbeat, pulse, send_to = _writer.beat, _writer.pulse, _writer.send_to
