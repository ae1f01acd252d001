"""The signals that ask a run to stop: from a person, a terminal that closes, Ray, Kubernetes, Slurm."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Slurm sends SIGUSR1 or SIGUSR2 where `--signal` says so."""

Handler = Callable[[int, FrameType | None], None] | signal.Handlers


def install_stop_handlers(handler: Handler) -> None:
    """Gives the stop signals to `handler` from here on, except those that are ignored, as `nohup` ignores SIGHUP."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


@contextmanager
def stop_handlers(handler: Handler) -> Iterator[None]:
    """Gives the stop signals to `handler` in the body, which runs in the main thread."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    install_stop_handlers(handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def block_stop_signals() -> Iterator[None]:
    """Blocks the stop signals in the body, and for good in processes that start in it.

    For those that serve a process which is to answer the signals itself, and which a signal to the whole process group
    would end before they have handlers of their own. Python's resource tracker is the first of them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        resource_tracker.ensure_running()  # unblocks SIGINT and SIGTERM if it starts
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_resource_tracker() -> None:
    """Starts Python's resource tracker, if it does not run, so that it outlives a signal to the whole process group."""
    with block_stop_signals():
        pass
