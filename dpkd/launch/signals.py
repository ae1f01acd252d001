"""The signals that ask a run to stop: from a user, a closed terminal, Ray, Kubernetes or Slurm."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Slurm sends SIGUSR1 or SIGUSR2 if `--signal` names it."""

Handler = Callable[[int, FrameType | None], None] | signal.Handlers


def install_stop_handlers(handler: Handler) -> None:
    """Sets `handler` for the stop signals, except ignored ones (`nohup` ignores SIGHUP)."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


@contextmanager
def stop_handlers(handler: Handler) -> Iterator[None]:
    """Sets `handler` for the stop signals in the body, which must run in the main thread."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    install_stop_handlers(handler)
    try:
        yield
    finally:
        for number, earlier_handler in before.items():
            signal.signal(number, earlier_handler)


@contextmanager
def block_stop_signals() -> Iterator[None]:
    """Blocks the stop signals in the body, and permanently in processes that start in it.

    A signal to the whole process group must not end helper processes, such as Python's resource tracker, or workers
    without handlers yet: the main process handles the signal.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        resource_tracker.ensure_running()  # its start unblocks SIGINT and SIGTERM
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
