"""How the workers of this machine start: forked from a process that has loaded what they need, where the system can.

A worker is at work in a tenth of a second instead of the seconds that it takes to load torch and timm, which counts at
each restart. The process that they are forked from is `multiprocessing`'s own fork server, which lives on as long as
any worker; its public face can neither end it nor have workers let go of it.
"""
# ruff: noqa: SLF001

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from typing import Any

from dpkd.stop_signals import held


def load_ahead(*modules: str) -> str:
    """Starts the process that workers are forked from, which loads these modules while this one goes on.

    A signal to the whole process group does not end it: its workers, which would go with it, are to save first.
    Returns how workers are to start, as `multiprocessing` names it: where there can be no such process, or one of
    somebody else's runs, with other modules and another output, they are spawned.
    """
    server: Any = forkserver._forkserver
    foreign = server._forkserver_pid is not None and server._preload_modules != list(modules)
    if foreign or "forkserver" not in multiprocessing.get_all_start_methods():
        return "spawn"
    forkserver.set_forkserver_preload(list(modules))
    with held():
        forkserver.ensure_running()
    return "forkserver"


@contextmanager
def forking(*modules: str) -> Iterator[str]:
    """Has workers that start meanwhile forked from a process that has loaded these modules; gives what it returns."""
    start_method = load_ahead(*modules)
    try:
        yield start_method
    finally:
        server: Any = forkserver._forkserver
        if start_method == "forkserver":
            server._stop()  # it keeps the output and the environment of the moment in which it began


def end_with_driver() -> None:
    """Has this worker killed with its driver, at once: it must not write into a run that was started again.

    The fork server ends with the last process that holds this end of its pipe, which is then the driver alone.
    """
    server: Any = forkserver._forkserver
    if server._forkserver_alive_fd is not None:
        os.close(server._forkserver_alive_fd)
        server._forkserver_alive_fd = None
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
