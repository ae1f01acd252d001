"""Signs of life of a worker, in memory that it shares with its watchdog: some microseconds each, and no disk."""

import mmap
import os
import struct
import threading
from dataclasses import dataclass

STEADY = "train"
"""The phase that beats once a step. Every other one may take `SLOW` times as long."""
SLOW = 6
RESTING = "rest"
"""The phase that may take as long as it likes, unless the process is stopped."""

_LAYOUT = struct.Struct("=QQQQQ16s")
SIZE = _LAYOUT.size


@dataclass(frozen=True)
class Beat:
    """What a worker last said of itself."""

    pulses: int
    """Grows with every sign of life."""
    beats: int
    """Grows where every rank passes, so that it tells which rank is behind."""
    allowance: int
    """How many hang timeouts may pass until the next sign."""
    step: int
    thread: int
    """Python's number of the thread that beats."""
    phase: str

    @classmethod
    def read(cls, memory: bytes) -> "Beat":
        """The beat in the first `SIZE` bytes of the memory."""
        pulses, beats, allowance, step, thread, phase = _LAYOUT.unpack(memory[:SIZE])
        return cls(pulses, beats, allowance, step, thread, phase.rstrip(b"\0").decode())


class _Heart:
    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self._process = os.getpid()
        self._pulses = self._beats = 0
        self._before = ""
        self.beat("start", step=0)

    def beat(self, phase: str, *, step: int) -> None:
        # a peer may still be in the phase before, and this rank waits for it in the next one
        steady = phase == self._before == STEADY
        self._beats += 1
        self._rest = (self._beats, 1 if steady else SLOW, step, threading.get_ident(), phase.encode())
        self._before = phase
        self.pulse()

    def pulse(self) -> None:
        if os.getpid() == self._process:  # not a loader worker that was forked from it
            self._pulses += 1
            _LAYOUT.pack_into(self._memory, 0, self._pulses, *self._rest)


_heart: _Heart | None = None


def beat(phase: str, *, step: int = 0) -> None:
    """Says that this worker lives and enters a phase (16 characters); every rank calls it at the same places."""
    if _heart is not None:
        _heart.beat(phase, step=step)


def pulse() -> None:
    """Says that this worker lives, inside a phase; ranks may differ in how often they call it."""
    if _heart is not None:
        _heart.pulse()


def rest() -> None:
    """Says that this worker waits to be given work."""
    beat(RESTING)


def start(memory: mmap.mmap) -> None:
    """Lets this process beat into the memory, of `SIZE` bytes or more."""
    global _heart  # noqa: PLW0603  one heart a process, as there is one stop flag
    _heart = _Heart(memory)


def stop() -> None:
    """Ends it: beats go nowhere from here on."""
    global _heart  # noqa: PLW0603
    _heart = None
