"""The fork server of `multiprocessing`: a process that has loaded the workers' modules, and forks the workers.

A forked worker starts in 0.1 s instead of the seconds that torch and timm take to load; each restart gains from it. No
public function ends the fork server, so this module uses private ones.
"""
# ruff: noqa: SLF001

import ctypes
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import connection, forkserver
from typing import Any

from dpkd.launch.signals import block_stop_signals

ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"
)
"""The environment that limits numpy, torch and similar libraries to one thread; each reads it once, at its import."""


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Limits processes that start in the body to one computing thread each; this process keeps its number."""
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
    """Starts the fork server, which loads these modules in the background; returns the start method of workers.

    A signal to the whole process group does not end the server, because its workers, which end with it, must save
    first. The method is `spawn` if a server with other modules runs already.
    """
    # threads that spin while they wait are six times slower beside other work
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch reads it once, at its import
    server: Any = forkserver._forkserver
    is_foreign = server._forkserver_pid is not None and server._preload_modules != list(modules)
    if is_foreign:
        return "spawn"
    forkserver.set_forkserver_preload(list(modules))
    with block_stop_signals():
        forkserver.ensure_running()  # starts a new server if the old one has died
    return "forkserver"


def end_fork_server(*modules: str) -> None:
    """Ends the fork server of these modules and all its workers; it cannot change its output and environment."""
    server: Any = forkserver._forkserver
    if server._forkserver_pid is not None and server._preload_modules == list(modules):
        with suppress(ChildProcessError, FileNotFoundError):  # the server was killed
            server._stop()


def end_with_parent() -> None:
    """Ends this process as soon as its parent ends, so that it cannot write to a continued run."""
    set_parent_death_signal = 1  # also with the fork server, which reports how this process ended
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    assert parent is not None, "multiprocessing did not start this process"

    def end_after(sentinel: int) -> None:
        connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=end_after, args=(parent.sentinel,), name="dpkd-parent", daemon=True).start()
