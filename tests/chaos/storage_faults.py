"""Trains, saves and logs samples in forked processes while storage calls fail; checks what the next attempt finds.

    LD_PRELOAD=faults.so python -m tests.chaos.storage_faults FOLDER FILE.json

runs the trials of the list in the file, each {"call", "kind", "size", "rank", "next_size"}: the call (counted from the
attempt's first in the run's folder, or in the one there that "below" names) that fails, how (faults.c), the number of
ranks, the one that it hits, and the number of the next attempt. A line of JSON a trial comes out. One process imports
torch and forks for every rank, which costs milliseconds.

An attempt goes on from the newest checkpoint (step 2 stands at first), and saves after steps 3 and 4; where a rank is
asked to stop, all do after the next save. The next attempt, without faults, must find no earlier step than the last
that was said to be saved, and end after step 6, which it saves, with the same weights as an unbroken run, to the last
bit where the number of ranks is the same; it leaves two whole checkpoints, and no half ones. By the sample logs of all
attempts each of the six steps used just the samples that the order gives it.
"""

import ctypes
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # optimizers load it at their first step: better once here than in every fork
import torch.distributed as dist

from dpkd.data.order import Order, rank_slice
from dpkd.engine.world import World, request_stop, stop_requested
from dpkd.errors import StorageError, UserError
from dpkd.io import errors
from dpkd.io.checkpoint_store import CheckpointStore
from dpkd.train.checkpoint import Checkpoints
from dpkd.train.parts import RandomState
from dpkd.train.sample_log import SampleLog, read_history, truncate
from dpkd.verbs.audit import judge
from tests.engine_cases import MICRO, NUM_MICROS, build, train

FIRST_SAVED, SAVES, LAST = 2, (3, 4), 6
ENDING = (*SAVES, LAST)
PATIENCE_S, HANG_PATIENCE_S = 60.0, 1.5
HANGS = (5, 7)
CHECKPOINTS, SAMPLE_LOG = "checkpoints", "sample_log"
ORDER = Order([13, 9], seed=3, global_batch_size=NUM_MICROS * MICRO, block_shards=1)
EXIT_REFUSED = 2
FAULTS = ctypes.CDLL(os.environ["LD_PRELOAD"]) if "LD_PRELOAD" in os.environ else None


def attempt(world: World, folder: Path, *, saves: tuple[int, ...], said: Callable[[str, int], None]) -> Any:
    """Goes on from the newest checkpoint to the last of the steps to save, and returns the trace of its end.

    `said` hears of the step that was found, and of each that is trained before a save, and saved.
    """
    engine = build("torch", world)
    parts: dict[str, Any] = {"net": engine.state, "random": RandomState(world)}
    checkpoints = Checkpoints(folder / CHECKPOINTS, world=world, keep=2)
    step = checkpoints.load_newest(parts)
    said("found", step)
    if world.rank == 0:
        truncate(folder / SAMPLE_LOG, from_attempt=checkpoints.attempt)
    sample_log = SampleLog(
        folder / SAMPLE_LOG, attempt=checkpoints.attempt, world=world, micro_batch_size=MICRO, start_step=step
    )
    parts["sample_log"] = sample_log
    for target in (save for save in saves if save > step):
        note(sample_log, world, steps=range(step, target))
        train(engine, world, first=step, last=target)
        step = target
        said("trained", step)
        checkpoints.save(step, parts)
        checkpoints.finish()
        said("saved", step)
        if world.any_of(stop_requested())[0]:
            break
    return train(engine, world, first=step, last=step)


def note(sample_log: SampleLog, world: World, *, steps: range) -> None:
    """Puts a rank's samples of these steps into its log."""
    for step in steps:
        dealt = rank_slice(ORDER.batch(step), rank=world.rank, world_size=world.size, micro_batch_size=MICRO)
        sample_log.add(step, dealt.reshape(-1))


def fork_ranks(size: int, meeting: Path, work: Callable[[World], None]) -> list[int]:
    """Forks a process for each rank, which does the work and exits: 0, or 2 after a refusal."""
    ranks = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            os._exit(_live(rank, size, meeting, work))
        ranks.append(pid)
    return ranks


def _live(rank: int, size: int, meeting: Path, work: Callable[[World], None]) -> int:
    os.dup2(2, 1)  # standard output is for the outcomes
    signal.signal(signal.SIGTERM, lambda *_: request_stop())
    try:
        if size > 1:
            dist.init_process_group(
                "gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
            )
        work(World(rank=rank, size=size, local_rank=rank, device=torch.device("cpu")))
    except (UserError, StorageError) as error:
        print(f"refused: {error}", file=sys.stderr, flush=True)
        return EXIT_REFUSED
    except BaseException as error:  # noqa: BLE001  this is a process's end
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def wait_for(ranks: list[int], *, patience_s: float) -> list[str]:
    """How each rank ended, in the order of ending; once one has failed, stopped or hung, the others are killed."""
    ended, deadline = [], time.monotonic() + patience_s
    left = list(ranks)
    while left:
        for pid in list(left):
            done, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
            if done == 0:
                continue
            if os.WIFSTOPPED(status):
                ended.append("stopped")
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            elif os.WIFSIGNALED(status):
                ended.append(signal.Signals(os.WTERMSIG(status)).name)
            else:
                ended.append(f"exit {os.WEXITSTATUS(status)}")
            left.remove(pid)
        if any(how != "exit 0" for how in ended) or time.monotonic() > deadline:
            time.sleep(0.05)
            for pid in left:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            return ended or ["hung"]
        time.sleep(0.002)
    return ended


class Trials:
    """Runs trials in a folder; keeps the unbroken end of each number of ranks to compare with."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._base = folder / "base"
        for size in (1, 2):
            self._run(size, self._base if size == 1 else folder / "two", saves=(1, FIRST_SAVED), name=f"first-{size}")
        self._ends = {}
        for size in (1, 2):
            place = folder / f"whole-{size}"
            shutil.copytree(self._base, place)
            self._run(size, place, saves=ENDING, name=f"end-{size}")
            self._ends[size] = torch.load(folder / f"end-{size}", weights_only=True)

    def _run(self, size: int, place: Path, *, saves: tuple[int, ...], name: str, fault: Any = None) -> list[str]:
        """An attempt of `size` ranks; leaves what was said in `<name>.said`, and the weights under `name`."""
        said = self._folder / f"{name}.said"
        said.write_text("")

        def work(world: World) -> None:
            errors.WAITS_S = (0.01, 0.01, 0.01)
            if fault is not None and world.rank == fault["rank"]:
                assert FAULTS is not None
                FAULTS.arm(str(place / fault.get("below", "")).encode(), ctypes.c_long(fault["call"]), fault["kind"])

            def say(what: str, step: int) -> None:
                if world.rank == 0:
                    with said.open("a") as file:
                        file.write(f"{what} {step}\n")

            trace = attempt(world, place, saves=saves, said=say)
            if fault is not None and world.rank == fault["rank"]:
                (self._folder / f"{name}.calls").write_text(str(FAULTS.calls()))
                FAULTS.disarm()
            if world.rank == 0 and trace is not None:
                torch.save(trace.weights, self._folder / name)

        meeting = self._folder / "meeting"
        with suppress(FileNotFoundError):
            meeting.unlink()
        hangs = fault is not None and fault["kind"] in HANGS
        ended = wait_for(fork_ranks(size, meeting, work), patience_s=HANG_PATIENCE_S if hangs else PATIENCE_S)
        assert fault is not None or ended == ["exit 0"] * size, ended
        return ended

    def calls(self, *, size: int, rank: int, below: str) -> int:
        """Storage calls of one rank in an attempt, below a folder of the run."""
        place = self._fresh()
        fault = {"rank": rank, "call": -1, "kind": 0, "below": below}
        self._run(size, place, saves=SAVES, name="count", fault=fault)
        return int((self._folder / "count.calls").read_text())

    def trial(self, given: dict[str, Any]) -> dict[str, Any]:
        """One fault, and what came of it."""
        place = self._fresh()
        ended = self._run(given["size"], place, saves=SAVES, name="broken", fault=given)
        self._run(given["next_size"], place, saves=ENDING, name="again")
        trained, saved = self._said("broken", "trained"), self._said("broken", "saved")
        found = self._said("again", "found")[0]
        weights, end = torch.load(self._folder / "again", weights_only=True), self._ends[given["size"]]
        # a state that two ranks made part of the way and one the rest is near both unbroken ends
        off = max(float((weights[name].double() - end[name].double()).abs().max()) for name in end)
        same = given["next_size"] == given["size"]
        good = found >= max([FIRST_SAVED, *saved]) and (off == 0 if same else off < 1e-5)
        told = {"ended": ended, "found": found, "off": off, "good": good, "left": _left_over(place / CHECKPOINTS)}
        told["misused"] = judge(read_history(place / SAMPLE_LOG), ORDER, range(LAST))
        return {**given, **told, "lost_steps": max([found, *trained]) - found}

    def _said(self, name: str, what: str) -> list[int]:
        """The steps of which an attempt said this."""
        lines = [line.split() for line in (self._folder / f"{name}.said").read_text().splitlines()]
        return [int(step) for word, step in lines if word == what]

    def _fresh(self) -> Path:
        place = self._folder / "place"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self._base, place)
        return place


def _left_over(place: Path) -> list[str]:
    """What stands in a folder of checkpoints beside the two last, whole ones and the claims."""
    standing = [mark.name for mark in CheckpointStore(str(place)).committed()]
    names = [path.name for path in place.iterdir() if not path.name.startswith("attempt-")]
    hidden = [str(path.relative_to(place)) for path in place.rglob(".*")]
    return [name for name in names if name not in standing[-2:]] + hidden


def main() -> None:
    torch.set_num_threads(1)
    trials = Trials(Path(sys.argv[1]))
    for given in json.loads(Path(sys.argv[2]).read_text()):
        if "count" in given:
            del given["count"]
            print(json.dumps({"calls": trials.calls(**given)}), flush=True)
        else:
            print(json.dumps(trials.trial(given)), flush=True)


if __name__ == "__main__":
    main()
