"""The signals that ask a run to stop: from a person, a terminal that closes, Ray, Kubernetes, Slurm."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Slurm sends SIGUSR1 or SIGUSR2 where `--signal` says so."""

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


def heed(handler: Handler) -> None:
    """Gives the stop signals to `handler` from here on, but for those that are ignored, as `nohup` ignores SIGHUP."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)
