"""The fork server of `multiprocessing`: a process that has loaded what workers need, and forks them.

A worker is at work in a tenth of a second instead of the seconds that it takes to load torch and timm, which counts at
each restart. No public function ends the fork server, hence the private ones here.
"""
# ruff: noqa: SLF001

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import connection, forkserver
from typing import Any

from dpkd.launch.signals import block_stop_signals

ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"
)
"""The environment that keeps numpy, torch and their like to one thread; each reads it once, as it is loaded."""


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Gives the processes that start in the body one computing thread each; this process keeps its own."""
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ.update(ONE_THREAD)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def load_ahead(*modules: str) -> str:
    """Starts the fork server, which loads these modules while this process goes on; returns how workers are to start.

    A signal to the whole process group does not end it: its workers, which would go with it, are to save first. Workers
    are spawned where there can be no fork server, or one with other modules and another output runs already.
    """
    # the threads of a worker would spin while they wait: six times slower where anything else runs
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is loaded
    server: Any = forkserver._forkserver
    is_foreign = server._forkserver_pid is not None and server._preload_modules != list(modules)
    if is_foreign or "forkserver" not in multiprocessing.get_all_start_methods():
        return "spawn"
    forkserver.set_forkserver_preload(list(modules))
    with block_stop_signals():
        forkserver.ensure_running()  # a new one, if it has died
    return "forkserver"


def end_fork_server(*modules: str) -> None:
    """Ends the fork server of these modules, and all its workers: it keeps the output and environment of its start."""
    server: Any = forkserver._forkserver
    if server._forkserver_pid is not None and server._preload_modules == list(modules):
        with suppress(ChildProcessError, FileNotFoundError):  # it was killed
            server._stop()


def end_with_parent() -> None:
    """Ends this process at once with the one that started it: it must not write into a run that goes on."""
    if sys.platform == "linux":  # and with the fork server, without which nobody learns how this process ended
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    assert parent is not None, "it was started by multiprocessing"

    def end_after(sentinel: int) -> None:
        connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=end_after, args=(parent.sentinel,), name="dpkd-parent", daemon=True).start()
