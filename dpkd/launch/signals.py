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


def install_stop_handlers(handler: Handler) -> None:
    """Gives the stop signals to `handler` from here on, except those that are ignored, as `nohup` ignores SIGHUP."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


@contextmanager
def stop_handlers(handler: Handler) -> Iterator[None]:
    """Gives the stop signals to `handler` in the body; does nothing outside the main thread, which alone may."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    install_stop_handlers(handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def start_resource_tracker() -> None:
    """Starts Python's resource tracker, if it does not run, so that it outlives a signal to the whole process group."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # a new process inherits what is blocked
    try:
        resource_tracker.ensure_running()  # it ignores SIGINT and SIGTERM by itself, and unblocks them here
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def block_stop_signals() -> Iterator[None]:
    """Keeps the stop signals waiting until the end of the body, and for good in processes that start in it.

    For those that serve a process which is to answer the signals itself, and which a signal to the whole process group
    would end before they have handlers of their own.
    """
    start_resource_tracker()  # started in the body, it would unblock SIGINT and SIGTERM
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
