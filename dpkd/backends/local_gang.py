"""Workers on this machine, under torch's elastic agent.

The agent starts, watches and ends one generation of workers; whether another follows is decided here (`gang.verdict`),
because only we can tell a user's error and a stop from a death. Each generation has a folder:

    generation-0/
      stop            exists once this process or a worker was asked to stop: for workers not yet listening to signals
      1.up            that a worker has come so far as to be watched
      1.late          why one that has not was ended
      0.ended         that a worker was ended because another had died
      rank-1.pickle   the `Failure` of a worker that raised
      0.done          that a worker has done its work
      …/1/stderr.log  what workers other than the first printed
"""

import logging
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std

from dpkd import world
from dpkd.backends.forking import end_with_driver, forking, load_ahead
from dpkd.backends.loopback import LOOPBACK, LoopbackRendezvous
from dpkd.errors import StopRequested, UserError
from dpkd.gang import UNSUPERVISED, Failure, Supervision, supervise, with_hangs
from dpkd.heartbeat import SLOW
from dpkd.placement import Room
from dpkd.stop_signals import STOP_SIGNALS, heeding
from dpkd.watchdog import WatchOrder, hangs, watched

LOOK_S = 0.1
PEERS_PATIENCE_S = 5.0
"""What workers have to end by themselves once one has died, which those that wait for it to join do not."""
AGENT_PATIENCE_S = 20.0
"""Less than the 30 s that the agent gives the others once one was stopped."""
EXIT_CODES: dict[type[Exception], int] = {UserError: 2, StopRequested: 75}


class LocalGang:
    """`num_workers` processes on this machine (none: one a GPU, or one); the first one's output is the user's.

    `threads` are the CPU threads of one worker (none: the cores shared out, unless OMP_NUM_THREADS says). Workers that
    were asked to stop are killed after `stop_grace_s`, or at a second Ctrl-C.
    """

    def __init__(
        self,
        num_workers: int | None = None,
        *,
        max_restarts: int,
        threads: int | None = None,
        stop_grace_s: float = 30.0,
        hang_timeout_s: float | None = None,
    ) -> None:
        assert num_workers is None or num_workers >= 1, num_workers
        self.num_workers = num_workers or max(1, torch.cuda.device_count())
        self._max_restarts = max_restarts
        self._threads = threads or _default_threads(self.num_workers)
        self._stop_grace_s = stop_grace_s
        self._hang_timeout_s = hang_timeout_s

    def run(self, work: Callable[[Any], None], argument: Any, *, supervision: Supervision = UNSUPERVISED) -> None:
        """See `Gang.run`."""
        _quieten_elastic()
        # the threads of a worker spin while they wait, unless told not to: six times slower where anything else runs
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        with tempfile.TemporaryDirectory(prefix="dpkd-gang-") as folder:
            stopper = _Stopper(grace_s=self._stop_grace_s)

            def run_once() -> list[Failure]:
                generation = Path(tempfile.mkdtemp(prefix="generation-", dir=folder))
                order = supervision.order(hang_timeout_s=self._hang_timeout_s)
                load_ahead(__name__, work.__module__)  # anew, where the process that workers are forked from has died
                task = _Task(work, argument, generation, self._threads, order)
                failures = self._run_agent(task, stopper, start_method=start_method)
                return with_hangs(failures, hangs(order) if order is not None else [])

            with heeding(stopper.on_signal), forking(__name__, work.__module__) as start_method:
                supervise(
                    run_once,
                    max_restarts=self._max_restarts,
                    stop_requested=lambda: stopper.requested,
                    supervision=supervision,
                )

    def _run_agent(self, task: "_Task", stopper: "_Stopper", *, start_method: str) -> list[Failure]:
        spec = WorkerSpec(
            role="dpkd",
            local_world_size=self.num_workers,
            entrypoint=_enter,
            args=(task,),
            rdzv_handler=LoopbackRendezvous(),
            max_restarts=0,
            monitor_interval=0.1,
            local_addr=LOOPBACK,
        )
        others: dict[int, Std] = dict.fromkeys(range(1, self.num_workers), Std.ALL)
        logs = DefaultLogsSpecs(log_dir=str(task.folder), redirects=others)
        agent = LocalElasticAgent(spec, logs, start_method=start_method)
        with stopper.watching(agent, task.folder), _ending_the_stuck(agent, task):
            result = agent.run()
        return _failures(result, task.folder, exit_codes=_exit_codes(agent)) if result.is_failed() else []


@dataclass(frozen=True)
class _Task:
    work: Callable[[Any], None]
    argument: Any
    folder: Path
    threads: int | None
    order: WatchOrder | None


class _Stopper:
    """Turns signals to this process into a request to its workers, and into their end when they take too long."""

    def __init__(self, *, grace_s: float) -> None:
        self.requested = world.stop_requested()
        self._grace_s = grace_s
        self._agent: LocalElasticAgent | None = None
        self._folder = Path()

    @contextmanager
    def watching(self, agent: LocalElasticAgent, folder: Path) -> Iterator[None]:
        """Passes requests on to the workers of this agent, whose generation has the folder."""
        # The agent would answer the first signal itself, and a second one by leaving its workers behind.
        handled_by_agent = os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE")
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
        at_quit = signal.getsignal(signal.SIGQUIT)
        self._agent, self._folder = agent, folder
        if self.requested:  # before there was an agent
            self._ask()
        try:
            yield
        finally:
            self._agent = None
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGQUIT, at_quit)
            os.environ.pop("TORCHELASTIC_SIGNALS_TO_HANDLE")
            if handled_by_agent is not None:
                os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = handled_by_agent

    def on_signal(self, number: int, _frame: FrameType | None) -> None:
        """Asks once, however often the signals come; a second Ctrl-C ends the workers."""
        if not self.requested:
            self.requested = True
            self._ask()
        elif number == signal.SIGINT:
            self._signal_workers(signal.SIGKILL)

    def _ask(self) -> None:
        if self._agent is not None:
            (self._folder / "stop").touch()
            self._signal_workers(signal.SIGTERM)
            timer = threading.Timer(self._grace_s, self._signal_workers, (signal.SIGKILL,))
            timer.daemon = True
            timer.start()

    def _signal_workers(self, number: signal.Signals) -> None:
        for worker in self._agent.get_worker_group().workers if self._agent is not None else ():
            if worker.id is not None:
                with suppress(ProcessLookupError):  # it ended already
                    os.kill(worker.id, number)


@contextmanager
def _ending_the_stuck(agent: LocalElasticAgent, task: "_Task") -> Iterator[None]:
    over = threading.Event()
    watch = threading.Thread(target=_end_the_stuck, args=(agent, task.folder, task.order, over), daemon=True)
    watch.start()
    try:
        yield
    finally:
        over.set()
        watch.join()


def _end_the_stuck(agent: LocalElasticAgent, folder: Path, order: WatchOrder | None, over: threading.Event) -> None:
    """Ends workers that hang before they come to their own watchdog, and those that wait for a dead one in vain."""
    allowance_s = SLOW * order.hang_timeout_s if order is not None else float("inf")
    waited_s = since_death_s = 0.0  # counted in pieces, so that a pause of the whole machine counts little
    while not over.wait(LOOK_S):
        waited_s += LOOK_S
        started = {each.local_rank: each.id for each in agent.get_worker_group().workers if each.id is not None}
        living = {rank: process for rank, process in started.items() if _lives(process)}
        died = any(not (folder / f"{rank}.done").exists() for rank in started.keys() - living.keys())
        if died and not (folder / "stop").exists():
            since_death_s += LOOK_S
        for rank, process in living.items():
            if since_death_s > PEERS_PATIENCE_S:
                _end(process, folder / f"{rank}.ended", "waited for one that had died")
            elif waited_s > allowance_s and not (folder / f"{rank}.up").exists():
                _end(process, folder / f"{rank}.late", f"hung: not at work {allowance_s:.0f} s after it was started")


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def _end(process: int, mark: Path, why: str) -> None:
    with suppress(OSError):  # a full disk; the worker is ended all the same
        mark.write_text(why)
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def room() -> Room:
    """What this machine has for workers."""
    return Room(_num_cores(), torch.cuda.device_count())


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _default_threads(num_workers: int) -> int | None:
    if "OMP_NUM_THREADS" in os.environ:
        return None
    return max(1, _num_cores() // num_workers)


def _quieten_elastic() -> None:
    """Keeps the agent's own account of failures off the screen; ours follows."""
    logger = logging.getLogger("torch.distributed.elastic")
    logger.propagate = False
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)


def _exit_codes(agent: LocalElasticAgent) -> dict[int, int | None]:
    """How the process of each rank ended; negative codes are signals."""
    context: Any = agent._pcontext  # noqa: SLF001
    return {rank: process.exitcode for rank, process in enumerate(context._pc.processes)}  # noqa: SLF001


def _failures(result: RunResult, folder: Path, *, exit_codes: Mapping[int, int | None]) -> list[Failure]:
    """What the workers wrote, the death that the agent saw, and those that it did not.

    The agent looks every tenth of a second and tells of one failure; when a worker is killed, that is often a peer
    whose connection broke. So a worker that left no word counts as dead before them, unless the agent had to wait.
    """
    told: list[Failure] = [pickle.loads(path.read_bytes()) for path in sorted(folder.glob("rank-*.pickle"))]
    first_s = min((failure.time_s for failure in told), default=time.time())
    heard = {failure.rank for failure in told} | {int(path.stem) for path in folder.glob("*.done")}
    heard |= {int(path.stem) for path in folder.glob("*.ended")}
    deaths = []
    for rank in sorted(set(exit_codes) - heard):
        seen, exit_code, late = result.failures.get(rank), exit_codes[rank], folder / f"{rank}.late"
        if late.exists():
            cause = late.read_text()
        elif seen is not None:
            cause = Failure.of_exit_code(rank, seen.exitcode).cause
        elif told and time.time() - first_s < AGENT_PATIENCE_S:
            cause = "died without a word; killed, perhaps for memory"
            if exit_code is not None and exit_code != -signal.SIGTERM:  # by which the agent ends those that are left
                cause = Failure.of_exit_code(rank, exit_code).cause
        else:
            continue  # ended by the agent
        deaths.append(Failure(rank, cause + _last_lines(folder, rank), time_s=first_s))
    if not deaths + told:  # ended by the agent, or killed with it, and none of them told of it
        unfinished = [rank for rank in sorted(exit_codes) if not (folder / f"{rank}.done").exists()]
        deaths = [Failure.of_exit_code(rank, exit_codes[rank] or 0) for rank in unfinished]
    return deaths + told


def _last_lines(folder: Path, rank: int, *, num_lines: int = 20) -> str:
    lines = [line for path in folder.glob(f"*/attempt_0/{rank}/stderr.log") for line in path.open(errors="replace")]
    return "\n" + "".join(lines[-num_lines:]) if lines else ""


def _enter(task: _Task) -> None:
    """The life of a worker."""
    end_with_driver()
    for number in STOP_SIGNALS:  # the parent has them too, and passes them on as one; loader workers inherit this
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _on_worker_signal)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    if (task.folder / "stop").exists():
        world.request_stop()
    if task.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(task.threads)
        torch.set_num_threads(task.threads)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a laptop's host name often resolves to nowhere
    rank = int(os.environ["RANK"])
    try:
        with watched(task.order, rank=rank):
            (task.folder / f"{rank}.up").touch()
            task.work(task.argument)
    except Exception as error:  # noqa: BLE001  crosses to the parent, which raises it
        if isinstance(error, StopRequested):
            (task.folder / "stop").touch()
        part = task.folder / f"rank-{rank}.part"
        part.write_bytes(pickle.dumps(Failure.of_error(rank, error)))
        part.rename(part.with_suffix(".pickle"))
        _leave_at_once(EXIT_CODES.get(type(error), 1))
    (task.folder / f"{rank}.done").touch()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # what waits for its peers from here on need not be waited for


def _on_worker_signal(_number: int, _frame: FrameType | None) -> None:
    world.request_stop()


def _leave_at_once(exit_code: int) -> NoReturn:
    """Ends this process without unwinding it: what torch has open aborts or hangs when its peers are gone."""
    for child in multiprocessing.active_children():
        child.kill()  # loader workers hold copies of our connections, which peers must see closed
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
