"""The signals that ask a run to stop: from a person, a terminal that closes, Ray, Kubernetes, Slurm."""

import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Slurm sends SIGUSR1 or SIGUSR2 where `--signal` says so."""

TRACKER_PATIENCE_S = 5.0

Handler = Callable[[int, FrameType | None], None] | signal.Handlers


@contextmanager
def heeding(handler: Handler) -> Iterator[None]:
    """Gives the stop signals to `handler` in the body; does nothing outside the main thread, which alone may."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    heed(handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def shield_resource_tracker() -> None:
    """Starts Python's resource tracker so that it outlives a signal to the whole process group.

    It ignores SIGINT and SIGTERM by itself; killed by another one it is started again, with tracebacks on the screen.
    """
    with heeding(signal.SIG_IGN):  # a new process inherits what is ignored
        resource_tracker.ensure_running()


@contextmanager
def held() -> Iterator[None]:
    """Keeps the stop signals waiting until the end of the body, and for good in processes that start in it.

    For those that serve a process which is to answer the signals itself, and which a signal to the whole process group
    would end before they could say how they take it.
    """
    _end_stuck_resource_tracker()
    resource_tracker.ensure_running()  # started in the body, it would let SIGINT and SIGTERM through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # a new process inherits what is blocked
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_stuck_resource_tracker() -> None:
    """Ends the resource tracker, which is started anew at once, where it has not read for a while what it was told."""
    tracker: Any = resource_tracker._resource_tracker  # noqa: SLF001
    if tracker._fd is None or tracker._pid is None:  # noqa: SLF001  there is none, or somebody else's
        return
    if not select.select([], [tracker._fd], [], TRACKER_PATIENCE_S)[1]:  # noqa: SLF001
        with suppress(ProcessLookupError):
            os.kill(tracker._pid, signal.SIGKILL)  # noqa: SLF001


def heed(handler: Handler) -> None:
    """Gives the stop signals to `handler` from here on, but for those that are ignored, as `nohup` ignores SIGHUP."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)
