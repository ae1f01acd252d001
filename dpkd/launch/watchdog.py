"""A small process beside each worker that sees it hang, saves its stacks, and ends it.

A process and not a thread, because a worker that is stopped or holds the interpreter lock runs no thread. The worker's
signs of life (`heartbeat`) count up a number in shared memory; once it stands still for too long, the watchdog has the
stacks of all threads written by faulthandler, whose signal handler needs no interpreter lock, adds what the kernel says
of the threads, and kills the worker:

    <folder>/<session>-rank-1.txt      lines of key: value, an empty line, the threads, an empty line, the stacks

Only time in which the watchdog itself runs is counted, so Ctrl-Z and a suspended machine are no hangs. Linux alone;
elsewhere nothing is watched. Loads neither torch nor anything else of weight.
"""

import argparse
import faulthandler
import mmap
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dpkd.launch import heartbeat
from dpkd.launch.heartbeat import Beat

DUMP_TIMEOUT_S = 10.0
REPORT_TIMEOUT_S = 20.0
KEEP_S = 1.0
PEERS_FIRST_S = 5.0
"""A worker that waits for its peers is ended so much later, so that the one that is behind is seen to hang too."""
COLLECTIVES = "torch/distributed/distributed_c10d.py"
NOT_FOR_US = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}
"""Signals to the whole process group are the worker's to answer."""


@dataclass(frozen=True)
class WatchOrder:
    """What a gang or a pool asks of a watchdog: where reports go, what begins their names, how long a step may take."""

    folder: Path
    """Seen by the driver too."""
    session: str
    hang_timeout_s: float

    @classmethod
    def begin(cls, folder: Path | None, *, hang_timeout_s: float | None) -> "WatchOrder | None":
        """An order for a session that begins now; none where nobody is to be watched."""
        if folder is None or hang_timeout_s is None:
            return None
        session = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"
        return cls(folder, session, hang_timeout_s)


@dataclass(frozen=True)
class Hang:
    """What the driver learns of a worker that was ended for hanging."""

    rank: int
    phase: str
    step: int
    beats: int
    quiet_s: float
    state: str
    """The kernel's letter: R runs, S sleeps, T was stopped."""
    place: str
    """`file:line in function` of the thread that beats; empty where it could not say."""
    waits: bool
    """Whether it was waiting for its peers, so that another rank was behind."""
    time_s: float
    path: Path

    def __str__(self) -> str:
        doing = "stopped by a signal" if self.state == "T" else f"at {self.place}" if self.place else "stacks unknown"
        waiting = ", waiting for its peers" if self.waits else ""
        return (
            f"hung: no sign of life for {self.quiet_s:.0f} s in {self.phase}, step {self.step}, {doing}{waiting}; "
            f"its stacks are in {self.path}"
        )


def hangs(order: WatchOrder | None) -> list[Hang]:
    """The hangs that were reported, the rank that was behind first; none without an order. Raises `OSError`."""
    if order is None:
        return []
    found = [_read_report(path) for path in sorted(order.folder.glob(f"{order.session}-rank-*.txt"))]
    return sorted(found, key=lambda hang: (hang.beats, hang.waits, hang.time_s))


@contextmanager
def watched(order: WatchOrder | None, *, rank: int) -> Iterator[None]:
    """Has this process watched while the body runs; without an order, or not on Linux, it is not."""
    if order is None or sys.platform != "linux":
        yield
        return
    with (
        os.fdopen(os.memfd_create("dpkd-beat"), "r+b") as beat_file,
        os.fdopen(os.memfd_create("dpkd-stacks"), "r+b") as stack_file,
    ):
        beat_file.truncate(heartbeat.SIZE)
        memory = mmap.mmap(beat_file.fileno(), heartbeat.SIZE)
        faulthandler.register(_stacks_signal(), file=stack_file, all_threads=True)
        heartbeat.start(memory)
        kept = _Kept(partial(_start, order, rank=rank, handles=(beat_file.fileno(), stack_file.fileno())))
        try:
            yield
        finally:
            kept.end()
            heartbeat.stop()
            faulthandler.unregister(_stacks_signal())


class _Kept:
    """A process that is started anew whenever somebody ends it, such as the kernel for want of memory."""

    def __init__(self, start: Callable[[], subprocess.Popen[bytes]]) -> None:
        self._start, self._process = start, start()
        self._lock, self._over = threading.Lock(), False
        threading.Thread(target=self._keep, name="dpkd-keep", daemon=True).start()

    def _keep(self) -> None:
        while True:
            self._process.wait()
            time.sleep(KEEP_S)
            with self._lock, suppress(OSError):  # no memory for another one; tried again
                if self._over:
                    return
                self._process = self._start()

    def end(self) -> None:
        """Ends it for good."""
        with self._lock:
            self._over = True
            self._process.kill()
        self._process.wait()


def _stacks_signal() -> int:
    """A real-time signal, which nobody else uses: torch, Ray and schedulers have the others."""
    return signal.SIGRTMAX - 3


def _start(order: WatchOrder, *, rank: int, handles: tuple[int, int]) -> subprocess.Popen[bytes]:
    arguments = [str(order.folder.absolute()), order.session, str(order.hang_timeout_s), str(rank), str(os.getpid())]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, NOT_FOR_US)  # a new process inherits what is blocked
    try:
        return subprocess.Popen(
            [sys.executable, "-S", "-m", "dpkd.launch.watchdog", *arguments, *map(str, handles)],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=handles,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclass(frozen=True)
class _Watchdog:
    """The life of the watchdog: `run` returns when the worker has ended, by itself or by us."""

    order: WatchOrder
    rank: int
    process: int
    beat_handle: int
    stacks_handle: int

    def run(self) -> None:
        tick_s = min(1.0, self.order.hang_timeout_s / 10)
        last, quiet_s, looked_s = self._beat(), 0.0, time.monotonic()
        while os.getppid() == self.process:
            time.sleep(tick_s)
            now_s = time.monotonic()
            beat = self._beat()
            # no more than a little for each look: the rest was a pause of the whole machine, or of this process too
            quiet_s += min(now_s - looked_s, 2 * tick_s)
            if beat.pulses != last.pulses or (beat.phase == heartbeat.RESTING and _state(self.process) != "T"):
                quiet_s = 0.0
            last, looked_s = beat, now_s
            if quiet_s > beat.allowance * self.order.hang_timeout_s and not _is_debugged(self.process):
                if self._end_worker(beat, quiet_s):
                    return
                quiet_s = 0.0

    def _beat(self) -> Beat:
        return Beat.read(os.pread(self.beat_handle, heartbeat.SIZE, 0))

    def _end_worker(self, beat: Beat, quiet_s: float) -> bool:
        """Reports the hang and kills the worker; false where it turns out to live, or to be dead already."""
        began_s, state, threads = time.time(), _state(self.process), _threads(self.process)
        stacks = self._stacks() if state != "T" else "none: the process was stopped and could not write them\n"
        place, waits = _place(stacks, thread=beat.thread)
        if self._beat().pulses != beat.pulses or os.getppid() != self.process:
            return False
        head = {
            "rank": self.rank,
            "phase": beat.phase,
            "step": beat.step,
            "beats": beat.beats,
            "quiet_s": round(quiet_s, 3),
            "state": state,
            "place": place,
            "waits": int(waits),
            "time_s": began_s,
            "process": f"{self.process} on {socket.gethostname()}",
        }
        lines = "".join(f"{key}: {value}\n" for key, value in head.items())
        late = threading.Timer(REPORT_TIMEOUT_S, _end_without_a_report, (self.process,))
        late.start()
        try:
            _write_report(self.order, self.rank, f"{lines}\n{threads}\n{stacks}")
        except OSError as error:  # a full disk must not keep a hung worker alive
            sys.stderr.write(f"worker {self.rank} hung, and the report of it could not be written: {error}\n")
        late.cancel()
        if waits:
            time.sleep(PEERS_FIRST_S)
        _kill(self.process)
        return True

    def _stacks(self) -> str:
        start = before = os.fstat(self.stacks_handle).st_size
        os.kill(self.process, _stacks_signal())
        deadline_s = time.monotonic() + DUMP_TIMEOUT_S
        while time.monotonic() < deadline_s:
            time.sleep(0.2)
            size = os.fstat(self.stacks_handle).st_size
            if start < size == before:
                break
            before = size
        return os.pread(self.stacks_handle, before - start, start).decode(errors="replace") or "none were written\n"


def _kill(parent: int) -> None:
    """Ends the worker, and its loader workers, which hold copies of the connections that peers must see closed."""
    children = [child for child in _children(parent) if child != os.getpid()]
    if os.getppid() == parent:
        os.kill(parent, signal.SIGKILL)
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


def _end_without_a_report(parent: int) -> None:
    """Ends the worker and this process, where the storage of the report hangs too."""
    _kill(parent)
    os._exit(1)


def _place(stacks: str, *, thread: int) -> tuple[str, bool]:
    """Where a thread is, as `file:line in function`, and whether that is inside a collective."""
    for part in re.split(r"\n\s*\n", stacks):
        if f"0x{thread:016x}" not in part.partition("\n")[0]:
            continue
        frames = re.findall(r'File "(.*)", line (\d+) in (\S+)', part)
        waits = any(COLLECTIVES in file for file, _, _ in frames[:6])
        callers = [frame for frame in frames if not waits or "torch/distributed/" not in frame[0]]
        if callers:
            file, line, function = callers[0]
            return f"{'/'.join(Path(file).parts[-2:])}:{line} in {function}", waits
    return "", False


def _state(process: int) -> str:
    return "".join(_after_name(Path(f"/proc/{process}/stat")).split()[:1])


def _is_debugged(process: int) -> bool:
    return "\nTracerPid:\t0\n" not in Path(f"/proc/{process}/status").read_text()


def _threads(process: int) -> str:
    """Each thread by the kernel's account: number, name, state, what it waits in; and its kernel stack for root."""
    lines = ["threads: number, name, state, waits in\n"]
    for folder in sorted(Path(f"/proc/{process}/task").iterdir(), key=lambda path: int(path.name)):
        name, state, place, stack = (_proc_text(folder / file) for file in ("comm", "stat", "wchan", "stack"))
        lines.append(f"{folder.name} {name.strip()} {state.rpartition(')')[2].strip()[:1]} {place.strip()}\n")
        lines += [f"    {line}\n" for line in stack.splitlines()]
    return "".join(lines)


def _children(process: int) -> list[int]:
    parents = {int(path.parent.name): _after_name(path).split()[1:2] for path in Path("/proc").glob("[0-9]*/stat")}
    return [child for child, parent in parents.items() if parent == [str(process)]]


def _after_name(path: Path) -> str:
    """The fields of a `stat` file after the name, which may hold anything; state and parent come first."""
    return _proc_text(path).rpartition(")")[2]


def _proc_text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except (PermissionError, FileNotFoundError, ProcessLookupError):
        return ""  # not ours to read, or gone


def _write_report(order: WatchOrder, rank: int, text: str) -> None:
    order.folder.mkdir(parents=True, exist_ok=True)
    part = order.folder / f".{order.session}-rank-{rank}.part"
    part.write_text(text)
    part.rename(order.folder / f"{order.session}-rank-{rank}.txt")


def _read_report(path: Path) -> Hang:
    head = dict(line.split(": ", 1) for line in path.read_text().partition("\n\n")[0].splitlines())
    return Hang(
        rank=int(head["rank"]),
        phase=head["phase"],
        step=int(head["step"]),
        beats=int(head["beats"]),
        quiet_s=float(head["quiet_s"]),
        state=head["state"],
        place=head["place"],
        waits=head["waits"] == "1",
        time_s=float(head["time_s"]),
        path=path,
    )


def main() -> None:
    """Watches the parent process, as told on the command line by `watched`."""
    parser = argparse.ArgumentParser()
    for name, kind in (("folder", Path), ("session", str), ("hang_timeout_s", float)):
        parser.add_argument(name, type=kind)
    for name in ("rank", "process", "beat_handle", "stacks_handle"):
        parser.add_argument(name, type=int)
    told = vars(parser.parse_args())
    order = WatchOrder(told.pop("folder"), told.pop("session"), told.pop("hang_timeout_s"))
    with suppress(FileNotFoundError, ProcessLookupError):  # the worker ended while it was looked at
        _Watchdog(order, **told).run()


if __name__ == "__main__":
    main()
