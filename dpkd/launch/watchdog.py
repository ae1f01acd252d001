"""A small process per worker that detects a hang, saves the stacks, and ends the worker.

It is a process and not a thread, because a worker that is stopped or holds the interpreter lock runs no thread. The
worker's heartbeats (`heartbeat`) increase a number in shared memory. If the number is constant for too long, the
watchdog makes faulthandler write the stacks of all threads, which needs no interpreter lock, and kills the worker:

    <folder>/<session>-rank-1.txt      the fields of `Hang` as JSON, an empty line, the stacks

Only the running time of the watchdog counts, so Ctrl-Z and a suspended machine are no hangs. It works only on Linux. It
loads neither torch nor other heavy packages.
"""

import faulthandler
import json
import mmap
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from dpkd.launch import heartbeat
from dpkd.launch.heartbeat import Heartbeat, RunClock
from dpkd.launch.signals import STOP_SIGNALS

DUMP_TIMEOUT_S = 10.0
REPORT_TIMEOUT_S = 20.0
PEERS_FIRST_S = 5.0
"""Seconds by which a worker that waits for its peers is ended later: the hang of the rank behind is found first."""
COLLECTIVES = "torch/distributed/distributed_c10d.py"
STACKS_SIGNAL = signal.SIGRTMAX - 3
"""A real-time signal that torch, Ray and schedulers do not use."""


@dataclass(frozen=True)
class WatchOrder:
    """The order of a watchdog: the folder of reports, the start of their names, the longest time of a step."""

    folder: Path
    """The driver reads it too."""
    session: str
    hang_timeout_s: float

    @classmethod
    def begin(cls, folder: Path | None, *, hang_timeout_s: float | None) -> "WatchOrder | None":
        """An order for a session that starts now; None without a folder or a timeout."""
        if folder is None or hang_timeout_s is None:
            return None
        session = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"
        return cls(folder, session, hang_timeout_s)

    def report_path(self, rank: int | str) -> Path:
        """The path of the report of one worker."""
        return self.folder / f"{self.session}-rank-{rank}.txt"


@dataclass(frozen=True)
class Hang:
    """The report of a worker that was ended after a hang."""

    rank: int
    phase: str
    step: int
    beats: int
    quiet_s: float
    state: str
    """The state in the kernel: R running, S sleeping, T stopped."""
    place: str
    """`file:line in function` of the thread that sends the heartbeats; empty if unknown."""
    waits: bool
    """Whether the worker was waiting for its peers, so that another rank was behind."""
    time_s: float
    path: str

    def __str__(self) -> str:
        doing = "stopped by a signal" if self.state == "T" else f"at {self.place}" if self.place else "stacks unknown"
        waiting = ", waiting for its peers" if self.waits else ""
        return (
            f"hung: no sign of life for {self.quiet_s:.0f} s in {self.phase}, step {self.step}, {doing}{waiting}; "
            f"its stacks are in {self.path}"
        )


def read_hangs(order: WatchOrder | None) -> list[Hang]:
    """The reported hangs, with the rank behind first; empty without an order. Raises `OSError`."""
    if order is None:
        return []
    texts = [path.read_text() for path in sorted(order.folder.glob(order.report_path("*").name))]
    hangs = [Hang(**json.loads(text.partition("\n\n")[0])) for text in texts]
    return sorted(hangs, key=lambda hang: (hang.beats, hang.waits, hang.time_s))


@contextmanager
def watched(order: WatchOrder | None, *, rank: int) -> Iterator[None]:
    """Starts a watchdog of this process for the body; does nothing without an order."""
    if order is None:
        yield
        return
    with (
        os.fdopen(os.memfd_create("dpkd-heartbeat"), "r+b") as heartbeat_file,
        os.fdopen(os.memfd_create("dpkd-stacks"), "r+b") as stack_file,
    ):
        heartbeat_file.truncate(heartbeat.SIZE)
        heartbeat.send_to(mmap.mmap(heartbeat_file.fileno(), heartbeat.SIZE))
        faulthandler.register(STACKS_SIGNAL, file=stack_file, all_threads=True)
        handles = (heartbeat_file.fileno(), stack_file.fileno())
        arguments = (order.folder.absolute(), order.session, order.hang_timeout_s, rank, os.getpid(), *handles)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # inherited: only the worker handles them
        watchdog = subprocess.Popen(
            [sys.executable, "-S", "-m", "dpkd.launch.watchdog", *map(str, arguments)],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=handles,
        )
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        try:
            yield
        finally:
            watchdog.kill()
            watchdog.wait()
            heartbeat.send_to(None)
            faulthandler.unregister(STACKS_SIGNAL)


@dataclass(frozen=True)
class _Watchdog:
    """The watchdog process of one worker; `run` returns after the worker has ended or was killed."""

    order: WatchOrder
    rank: int
    process: int
    heartbeat_handle: int
    stacks_handle: int

    def run(self) -> None:
        tick_s = min(1.0, self.order.hang_timeout_s / 10)
        last, quiet_s, clock = self._heartbeat(), 0.0, RunClock(tick_s)
        while os.getppid() == self.process:
            time.sleep(tick_s)
            beat = self._heartbeat()
            quiet_s += clock.passed_s()
            if beat.pulses != last.pulses or (beat.phase == heartbeat.RESTING and self._status("State")[0] != "T"):
                quiet_s = 0.0
            last = beat
            if quiet_s > beat.allowance * self.order.hang_timeout_s and self._status("TracerPid") == "0":
                if self._end_worker(beat, quiet_s):
                    return
                quiet_s = 0.0

    def _heartbeat(self) -> Heartbeat:
        return Heartbeat.read(os.pread(self.heartbeat_handle, heartbeat.SIZE, 0))

    def _status(self, name: str) -> str:
        """A value from the worker's status in the kernel; the last match, since the process name may hold any text."""
        text = Path(f"/proc/{self.process}/status").read_text(errors="replace")
        return text.rpartition(f"\n{name}:\t")[2].partition("\n")[0]

    def _end_worker(self, beat: Heartbeat, quiet_s: float) -> bool:
        """Reports the hang and kills the worker; returns False if the worker has recovered or ended meanwhile."""
        began_s, state = time.time(), self._status("State")[0]
        stacks = self._stacks() if state != "T" else "none: the process was stopped and could not write them\n"
        place, waits = _place(stacks, thread=beat.thread)
        if self._heartbeat().pulses != beat.pulses or os.getppid() != self.process:
            return False
        path = self.order.report_path(self.rank)
        hang = Hang(
            rank=self.rank,
            phase=beat.phase,
            step=beat.step,
            beats=beat.beats,
            quiet_s=round(quiet_s, 3),
            state=state,
            place=place,
            waits=waits,
            time_s=began_s,
            path=str(path),
        )
        text = f"{json.dumps(asdict(hang), indent=0)}\n\n{stacks}"
        writer = threading.Thread(target=_write_report, args=(path, text), daemon=True)
        writer.start()
        writer.join(REPORT_TIMEOUT_S)  # hung storage must not keep a hung worker alive
        if waits:
            time.sleep(PEERS_FIRST_S)
        if os.getppid() == self.process:
            os.kill(self.process, signal.SIGKILL)
        return True

    def _stacks(self) -> str:
        start = before = os.fstat(self.stacks_handle).st_size
        os.kill(self.process, STACKS_SIGNAL)
        deadline_s = time.monotonic() + DUMP_TIMEOUT_S
        while time.monotonic() < deadline_s:
            time.sleep(0.2)
            size = os.fstat(self.stacks_handle).st_size
            if start < size == before:
                break
            before = size
        return os.pread(self.stacks_handle, before - start, start).decode(errors="replace") or "none were written\n"


def _write_report(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.stem}.part")
        part.write_text(text)
        part.rename(path)
    except OSError as error:  # a full disk must not either
        sys.stderr.write(f"a worker hung, and {path} could not be written: {error}\n")


def _place(stacks: str, *, thread: int) -> tuple[str, bool]:
    """The position of a thread, as `file:line in function`, and whether it is inside a collective."""
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


def main() -> None:
    """Watches the parent process with the command-line arguments of `watched`."""
    folder, session, hang_timeout_s, *numbers = sys.argv[1:]
    with suppress(FileNotFoundError, ProcessLookupError):  # the worker ended during a check
        _Watchdog(WatchOrder(Path(folder), session, float(hang_timeout_s)), *map(int, numbers)).run()
    os._exit(0)  # does not wait for a hung report


if __name__ == "__main__":
    main()
