"""A whole run under faults, one after the other: they are drawn, each strikes at its moment, and its cost is measured.

The run's processes have the library of faults.c preloaded: a plan beside the run folder strikes a rank in the middle of
a save, and two real-time signals make a process exit, or hold the interpreter lock.
"""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from dpkd.run.folder import RunFolder
from dpkd.stages.plan import STAGES
from tests.runs import Command

SIGNALS = {
    "SIGKILL": signal.SIGKILL,
    "SIGSTOP": signal.SIGSTOP,
    "SIGTERM": signal.SIGTERM,
    "SIGSEGV": signal.SIGSEGV,
    "exit": signal.SIGRTMIN + 5,
    "interpreter lock": signal.SIGRTMIN + 6,
}
HANGS = ("SIGSTOP", "interpreter lock")
DEADLY = [kind for kind in SIGNALS if kind not in HANGS]
KINDS_AT_A_CALL = {"SIGKILL": 1, "SIGSTOP": 2, "SIGSEGV": 3, "exit": 4, "hang": 5, "interpreter lock": 7, "SIGTERM": 8}
AT_CALLS_ONLY = ("hang", "rank")
"""A storage call that never returns, which no signal brings about."""
CALLS_OF_A_SAVE = 60
"""Storage calls of one rank between two saves, about."""
PATIENCE_S = 400.0


@dataclass(frozen=True)
class Fault:
    """What strikes whom, and when."""

    kind: str
    target: str
    """`rank` is one of the training or pool workers, `all` the whole process group."""
    moment: str
    """`start` of a driver or of its workers, a `step` of training, the next `save`, or `evaluate`."""
    step: int = 0
    """Of both stages together, for a step or a save."""
    wait_s: float = 0.0
    """After the moment."""
    call: int = 0
    """The storage call of the save that it strikes at."""


@dataclass(frozen=True)
class Cost:
    """What one fault cost; without numbers where it hit no training."""

    fault: Fault
    target: str
    recovery_s: float | None
    lost_steps: int | None


def draw(num_faults: int, *, steps: int, seed: int) -> list[Fault]:
    """Faults of every kind: a few while data are prepared, then all over the steps, the last while it is evaluated.

    A driver that hangs is not among them, nor a pool worker that does: nobody watches those.
    """
    draws = random.Random(seed)
    pairs = [(kind, "rank") for kind in SIGNALS] + [AT_CALLS_ONLY]
    pairs += [(kind, target) for target in ("driver", "all") for kind in DEADLY]
    late = [pair for _ in range(-(-num_faults // len(pairs))) for pair in draws.sample(pairs, len(pairs))][:num_faults]
    early = [pair for pair in late if pair[0] in DEADLY][: num_faults // 6]
    for pair in early:
        late.remove(pair)
    while AT_CALLS_ONLY in (late[0], late[-1]):
        draws.shuffle(late)
    moments = ["save" if pair == AT_CALLS_ONLY else draws.choice(_MOMENTS[pair[1] == "rank"]) for pair in late]
    moments[0], moments[-1] = "step", "evaluate"
    whole = zip([*early, *late], ["start"] * len(early) + moments, strict=True)
    return [
        Fault(
            kind,
            target,
            moment,
            step=steps * max(0, place - len(early) + 1) // (len(late) + 1),
            wait_s=draws.uniform(0, _WAITS_S[moment]),
            call=draws.randrange(CALLS_OF_A_SAVE),
        )
        for place, ((kind, target), moment) in enumerate(whole)
    ]


_MOMENTS = {True: ["start", "step", "save", "save"], False: ["start", "step", "step"]}
_WAITS_S = {"start": 8.0, "step": 0.2, "save": 0.0, "evaluate": 0.2}


class Campaign:
    """A run, started again with the next number of workers whenever its driver is gone, under faults in a row."""

    def __init__(
        self, tree: dict[str, Any], *, sizes: list[int], library: Path, seed: int, stages: str = ",".join(STAGES)
    ) -> None:
        self.folder = RunFolder(tree["run"]["dir"])
        self.temporary = self.folder.path.parent / "t"
        self.temporary.mkdir(parents=True)
        self._tree, self._sizes, self._stages = tree, cycle(sizes), stages
        self._plan = self.folder.path.with_suffix(".plan")
        self._environment = {
            "LD_PRELOAD": str(library),
            "FAULTS_BELOW": str(self.folder.path / "checkpoints"),
            "FAULTS_PLAN": str(self._plan),
            "TMPDIR": str(self.temporary),
        }
        self._draws = random.Random(seed)
        self._size = 0
        self._command: Command | None = None
        self._struck: list[_Struck] = []
        self.seen: set[int] = set()

    @property
    def output(self) -> str:
        """All that the run has printed."""
        return self._command.output if self._command else ""

    def run(self, faults: list[Fault]) -> None:
        """Strikes with every fault at its moment, then lets the run end."""
        for place, fault in enumerate(faults, 1):
            self._ensure_running()
            self._wait_for(fault)
            print(f"{place} of {len(faults)} after step {self._position()}: {fault}", flush=True)
            self._struck.append(self._strike(fault))
        for _ in range(3):
            self._ensure_running()
            assert self._command is not None
            code = self._command.process.wait(PATIENCE_S)
            if code == 0:
                return
        raise AssertionError(f"exit code {code} without a fault\n{self.output[-3000:]}")

    def processes(self) -> set[int]:
        """The run's processes that live."""
        mark = f"FAULTS_PLAN={self._plan}".encode()
        return {int(path.parent.name) for path in Path("/proc").glob("[0-9]*/environ") if mark in _environment(path)}

    def _ensure_running(self) -> None:
        if self._command is None or self._command.process.poll() is not None:
            self._size = next(self._sizes)
            arguments = (f"launcher.workers={self._size}", "--stages", self._stages)
            self._command = Command(self._tree, *arguments, environment=self._environment)

    def _wait_for(self, fault: Fault) -> None:
        """Returns at the fault's moment, but for its place in a save."""
        if fault.moment == "evaluate":
            self._until(lambda: "evaluate" in self.folder.stages())
        elif fault.moment != "start":
            self._until(lambda: self._position() >= fault.step)
        time.sleep(fault.wait_s)

    def _until(self, fact: Callable[[], bool]) -> None:
        """Waits for the fact, while the driver must not end."""
        deadline_s = time.monotonic() + PATIENCE_S
        while not fact():
            assert self._command is not None
            code = self._command.process.poll()
            assert code is None, f"exit code {code} without a fault\n{self.output[-3000:]}"
            assert time.monotonic() < deadline_s, self.output[-3000:]
            time.sleep(0.02)

    def _position(self) -> int:
        """Steps over both stages at the newest line of the log."""
        last = next((each for each in reversed(self._events()) if each["kind"] == "train"), None)
        if last is None:
            return 0
        before = self._tree["teachers"]["teacher"]["training"]["steps"] if last["stage"] == "distill" else 0
        return before + int(last["step"])

    def _events(self) -> list[dict[str, Any]]:
        if not self.folder.events.exists():
            return []
        lines = self.folder.events.read_text().splitlines()
        return [json.loads(line) for line in lines if line.endswith("}")]

    def costs(self) -> list[Cost]:
        """What each fault cost, once the run has ended."""
        events = self._events()
        return [_cost(struck, events) for struck in self._struck]

    def _strike(self, fault: Fault) -> "_Struck":
        """Strikes, and waits until the driver is gone, or has seen it and starts its workers again."""
        self.seen |= self.processes()
        num_restarts = len(self._restarts())
        in_pool = "pack" in self._stages and self.folder.stages().get("prepare", {}).get("status") != "done"
        target, struck_s = self._strike_save(fault) if fault.moment == "save" else self._send(fault)
        assert self._command is not None
        if in_pool and fault.target == "rank":
            return _Struck(fault, target, struck_s, None)  # its work is done again by another
        deadline_s = time.monotonic() + PATIENCE_S
        while self._command.process.poll() is None:
            assert time.monotonic() < deadline_s, f"{fault}: nothing came of it\n{self.output[-3000:]}"
            restarts = self._restarts()
            if len(restarts) > num_restarts:
                return _Struck(fault, target, struck_s, restarts[num_restarts])
            time.sleep(0.02)
        return _Struck(fault, target, struck_s, len(self._events()))

    def _send(self, fault: Fault) -> tuple[str, float]:
        """Sends the fault's signal; says to whom, and when."""
        assert self._command is not None
        number, driver = SIGNALS[fault.kind], self._command.process.pid
        if fault.target == "rank":
            self._until(lambda: len(self._workers()) > 0)
            worker = self._draws.choice(self._workers())
            worker.send_signal(number)
        elif fault.target == "driver":
            os.kill(driver, number)
        else:
            os.killpg(driver, number)
        whom = f"a worker of {self._size}" if fault.target == "rank" else fault.target
        return whom, time.time()

    def _strike_save(self, fault: Fault) -> tuple[str, float]:
        """Strikes a rank at one of the storage calls to come."""
        rank, struck = self._draws.randrange(self._size), self._plan.with_suffix(".plan.struck")
        struck.unlink(missing_ok=True)
        beside = self._plan.with_suffix(".part")
        beside.write_text(f"{time.time_ns()} {rank} {fault.call} {KINDS_AT_A_CALL[fault.kind]}")
        beside.rename(self._plan)
        self._until(struck.exists)
        return f"rank {rank} of {self._size}", time.time()

    def _workers(self) -> list[psutil.Process]:
        """The training or pool workers that run now: the former are forked from a server, the latter spawned."""
        assert self._command is not None
        try:
            children = psutil.Process(self._command.process.pid).children()
            forked = [worker for each in children if _runs(each, "forkserver") for worker in each.children()]
            # the process that workers are forked from starts others too, as it loads what they need
            workers = [each for each in forked if _runs(each, "forkserver")]
            return workers + [each for each in children if _runs(each, "spawn_main")]
        except psutil.Error:  # one of them is gone by now
            return []

    def _restarts(self) -> list[int]:
        """Places of the restarts among the events."""
        return [place for place, each in enumerate(self._events()) if each["kind"] == "restart"]


@dataclass(frozen=True)
class _Struck:
    fault: Fault
    target: str
    time_s: float
    end: int | None
    """Place in the log where the workers that it hit are gone; none where no training was hit."""


def _cost(struck: _Struck, events: list[dict[str, Any]]) -> Cost:
    place = len(events) if struck.end is None else struck.end
    again_at = next((k for k in range(place, len(events)) if events[k]["kind"] == "loop_began"), len(events))
    before = next((each for each in reversed(events[:again_at]) if each["kind"] == "train"), None)
    after = next((each for each in events[again_at:] if each["kind"] == "train"), None)
    if after is None or before is None:
        return Cost(struck.fault, struck.target, None, None)
    again = before["step"] - after["step"] + 1 if before["stage"] == after["stage"] else 0
    return Cost(struck.fault, struck.target, after["time"] - struck.time_s, max(0, again))


def _runs(process: psutil.Process, word: str) -> bool:
    return word in " ".join(process.cmdline())


def _environment(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().split(b"\0")
    except OSError:  # gone by now
        return []
