"""Damages one file of a tiny run and gives the command again, over and over, in forked processes.

    LD_PRELOAD=faults.so python -m tests.chaos.damaged_files FOLDER FILE.json

runs the trials of the list in the file, each {"state", "target", "fault", "seed"}, and prints a line of JSON for each
with its "outcome". The states are one run at several moments: `prepared`, `teaching` and `distilling` (stopped under
way, with two checkpoints), `finished`. A target is a kind of file of `TARGETS`, a fault one of `FAULTS` or `CALLS`;
which file of the kind, and which byte of it, the seed says. {"list": state} prints the files of each kind instead.

The outcome is told by what the command did:

    went on     exit 0, and every network has the weights of the run that nothing damaged
    mended      the same, and a line says which file was wrong
    refused     exit 2, and the message names the file; with the file restored the command goes on to those weights
    others      traceback, silent (other weights), vague (no name), harm (what was restored does not go on), hang

One process imports everything and forks for every command, which costs milliseconds; the stages run in it, one worker.
"""

import ctypes
import errno
import json
import os
import pickle
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # optimizers load it at their first step: better once here than in every fork

from dpkd import cli
from dpkd.engine import world
from dpkd.errors import EXIT_STOPPED
from dpkd.io import errors
from dpkd.launch.pool import answer_to, result_of
from dpkd.launch.worker_group import UNSUPERVISED, Supervision
from dpkd.run.folder import RunFolder
from dpkd.stages import driver, evaluate, session
from dpkd.train.divergence import write_skipped
from tests.chaos.file_faults import damage, names_file, obey_permissions
from tests.runs import CONV, FIGURE_GROUND, VIT, settings_of, train_events

STATES = ("prepared", "teaching", "distilling", "finished")
TARGETS = {
    "checkpoint part": "checkpoints/*/step-*/*/*.safetensors",
    "checkpoint inputs": "checkpoints/*/step-*/inputs/*.json",
    "checkpoint manifest": "checkpoints/*/step-*/manifest.json",
    "checkpoint file list": "checkpoints/*/step-*/files-*.json",
    "claim": "checkpoints/*/attempt-*.json",
    "sample log": "sample_log/*/*.log",
    "events": "events.jsonl",
    "settings": "settings.yaml",
    "versions": "versions.json",
    "stage records": "stages.json",
    "skipped": "skipped/*.json",
    "quarantine": "quarantine.jsonl",
    "data set manifest": "shards/dataset.json",
    "shard index": "shards/*.index.msgpack",
    "shard": "shards/*.tar",
    "prior manifest": "shards/priors/*/priors.json",
    "prior index": "shards/priors/*/*.index.msgpack",
    "prior shard": "shards/priors/*/*.tar",
    "network description": "*/**/network.json",
    "network weights": "[!e]*/**/model.safetensors",
    "evaluation": "evaluation.json",
    "summary": "summary.*",
    "export": "export/*/*",
}
CALLS = {name: 100 + number for name, number in vars(errno).items() if name in ("ENOSPC", "EROFS", "EACCES", "EDQUOT")}
"""Faults of storage: from some call on, whatever is written below the run folder fails."""
LIBRARY = ctypes.CDLL(os.environ["LD_PRELOAD"]) if "LD_PRELOAD" in os.environ else None
PATIENCE_S = 120.0
ALONE = world.World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
NETWORKS = ("teachers/teacher", "students/vit", "baselines/vit")


def tree(run: Path, *, source: Path, seed: int = 0) -> dict[str, Any]:
    """Settings of a run of seconds: two networks, one of them with dropout, and a baseline."""
    training = {"steps": 6, "batch_size": 8, "micro_batch_size": 8, "log_every": 1, "checkpoint_every": 2}
    training |= {"evaluate_every": 6, "panels_every": 6, "precision": "fp32"}
    return {
        "run": {"dir": str(run), "seed": seed},
        "launcher": {"kind": "local", "workers": 1, "pool_workers": 1},
        "data": {
            "source": str(source),
            "train": "base",
            "val": "val",
            "test": "novel",
            "image_size": 32,
            "samples_per_shard": 16,
            "bad_limit": 0.1,
            "loader": {"workers": 0},
        },
        "prepare": {"priors": [{"kind": kind} for kind in ("edge", "saliency")]},
        "teachers": {
            "teacher": {
                "model": CONV | FIGURE_GROUND,
                "objectives": [{"kind": "supervised"}, {"kind": "masked_prior", "targets": {"edge": 1.0}}],
                "engine": {"kind": "torch", "ema": 0.9},
                "training": training,
            }
        },
        "distill": {
            "students": {"vit": {"model": VIT, "engine": {"kind": "torch"}, "baseline": True}},
            "training": training,
        },
        "evaluate": {
            "episodes": {"episodes": 4, "queries": 2, "way": 3, "shots": [1]},
            "episodes_while_training": 2,
            "probes": None,
        },
        "export": {"onnx": False},
    }


class Here:
    """A pool and a worker group of one worker: this process."""

    num_workers = 1

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """See `Pool.map`."""
        for index, item in enumerate(items):
            yield index, result_of(answer_to(pickle.dumps(function), pickle.dumps(item)))

    def run(self, work: Callable[[Any], None], argument: Any, *, supervision: Supervision = UNSUPERVISED) -> None:
        """See `WorkerGroup.run`."""
        work(argument)


def command(settings: dict[str, Any], *, stages: Sequence[str] = cli.STAGES) -> int:
    """The command in this process, without new processes and long waits; its exit code."""
    torch.set_num_threads(1)
    driver.make_pool = driver.make_worker_group = lambda *_, **__: Here()  # type: ignore[assignment,return-value]
    driver.check_in_child = lambda *_: None  # type: ignore[assignment]
    errors.WAITS_S = (0.01,)
    evaluate.TIMING_S = 0.01
    return cli.exit_code(lambda: driver.run(settings_of(settings), stages=list(stages)))


def stop_in(stage: str, folder: RunFolder) -> None:
    """Asks this process to stop once the stage has made its third step, from a thread."""

    def watch() -> None:
        while not any(line["stage"] == stage and line["step"] >= 3 for line in train_events(folder)):
            time.sleep(0.001)
        world.request_stop()

    threading.Thread(target=watch, daemon=True).start()


def forked(work: Callable[[], int], *, log: Path) -> tuple[int | None, str, float]:
    """Does the work in a fork; its exit code (None where it hung), what it printed, and its seconds."""
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with log.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            code = work()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    while time.monotonic() - began < PATIENCE_S:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), log.read_text(errors="replace"), time.monotonic() - began
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None, log.read_text(errors="replace"), time.monotonic() - began


def weights(run: Path) -> dict[str, bytes]:
    """The bytes of every network that the run trained, and of every export, by place."""
    paths = [run / name / "model.safetensors" for name in NETWORKS]
    paths += [run / "export/vit/model.safetensors", run / "export/vit/config.json"]
    return {str(path.relative_to(run)): path.read_bytes() if path.is_file() else b"" for path in paths}


class Trials:
    """One run at several moments, and the trials on copies of it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._source = folder / "images"
        self.run = folder / "run"  # always here: settings and records name the place
        self._settings = tree(self.run, source=self._source)
        self._log = folder / "log"
        self._make_states()
        self._expected = weights(self._kept("finished"))

    def _kept(self, state: str) -> Path:
        return self._folder / f"kept-{state}"

    def _make_states(self) -> None:
        draw_images(self._source)
        other = tree(self.run, source=self._source, seed=1)
        self._attempt(lambda: command(other), expected=0)
        self._keep("other")
        self._attempt(lambda: command(self._settings, stages=("pack", "prepare")), expected=0)
        skip_first_steps(self.run)
        self._keep("prepared", leave=True)
        for stage, state in (("teach", "teaching"), ("distill", "distilling")):

            def stopped(stage: str = stage) -> int:
                stop_in(stage, RunFolder(self.run))
                return command(self._settings)

            self._attempt(stopped, expected=EXIT_STOPPED)
            self._keep(state, leave=True)
        self._attempt(lambda: command(self._settings), expected=0)
        self._keep("finished")

    def _attempt(self, work: Callable[[], int], *, expected: int) -> None:
        code, printed, _ = forked(work, log=self._log)
        assert code == expected, (code, printed)

    def _keep(self, state: str, *, leave: bool = False) -> None:
        shutil.copytree(self.run, self._kept(state), symlinks=True)
        if not leave:
            shutil.rmtree(self.run)

    def files(self, state: str) -> dict[str, list[str]]:
        """The files of each kind in a state."""
        kept = self._kept(state)
        found = {
            target: sorted(str(path.relative_to(kept)) for path in kept.glob(pattern) if path.is_file())
            for target, pattern in TARGETS.items()
        }
        if state == "teaching":  # a stage that has not begun has skipped nothing yet
            found["skipped"].remove("skipped/distill.json")
        return found

    def trial(self, given: dict[str, Any]) -> dict[str, Any]:
        """One fault, and what came of it."""
        draws = random.Random(given["seed"])
        self._restore(given["state"])
        act = self._with_failing_calls if given["fault"] in CALLS else self._with_damage
        return {**given, **act(given, draws)}

    def _restore(self, state: str) -> None:
        if self.run.exists():
            for path in [self.run, *self.run.rglob("*")]:
                if not path.is_symlink():
                    path.chmod(0o755)
            shutil.rmtree(self.run)
        shutil.copytree(self._kept(state), self.run, symlinks=True)

    def _with_damage(self, given: dict[str, Any], draws: random.Random) -> dict[str, Any]:
        names = self.files(given["state"])[given["target"]]
        if not names:
            return {"outcome": "absent"}
        name = draws.choice(newest(names))
        path = self.run / name
        others = [self.run / each for each in names if each != name]
        earlier = ["other", *STATES[: STATES.index(given["state"])]]
        stale = [self._kept(state) / name for state in earlier]
        touched = damage(path, given["fault"], draws=draws, others=others, stale=stale)
        if not touched:
            return {"outcome": "absent"}

        def again() -> int:
            obey_permissions()
            return command(self._settings)

        code, printed, seconds = forked(again, log=self._log)
        found = {"file": name, "seconds": round(seconds, 2), "said": printed[-3000:]}
        outcome = self._told(code, printed, touched)
        if outcome == "refused" and not self._goes_on_once_restored(given["state"], touched):
            outcome = "harm"
        return {**found, "outcome": outcome}

    def _told(self, code: int | None, printed: str, touched: list[Path]) -> str:
        if code is None:
            return "hang"
        if "Traceback" in printed or code not in (0, 2):
            return "traceback"
        named = any(names_file(printed, path) for path in touched)
        if code == 2:
            return "refused" if named else "vague"
        if weights(self.run) != self._expected:
            return "silent"
        return "mended" if named else "went on"

    def _goes_on_once_restored(self, state: str, touched: list[Path]) -> bool:
        """Puts the damaged files back, and gives the command once more."""
        for path in touched:
            kept = self._kept(state) / path.relative_to(self.run)
            path.parent.chmod(0o755)
            if path.is_dir():
                path.rmdir()
            elif path.is_symlink() or path.exists():
                path.unlink()
            if kept.exists():
                shutil.copy2(kept, path)
        code, _, _ = forked(lambda: command(self._settings), log=self._log)
        return code == 0 and weights(self.run) == self._expected

    def _with_failing_calls(self, given: dict[str, Any], draws: random.Random) -> dict[str, Any]:
        """The command while storage fails from some call on, then the command again."""
        assert LIBRARY is not None, "run with LD_PRELOAD"
        kind, calls = CALLS[given["fault"]], self._folder / "calls"

        def under_fire(first: int) -> Callable[[], int]:
            def work() -> int:
                LIBRARY.arm(str(self.run).encode(), ctypes.c_long(first), kind)
                code = command(self._settings)
                calls.write_text(str(LIBRARY.calls()))
                return code

            return work

        if not hasattr(self, "_num_calls"):
            self._num_calls: dict[str, int] = {}
        if given["state"] not in self._num_calls:
            forked(under_fire(10**9), log=self._log)
            self._num_calls[given["state"]] = int(calls.read_text())
            self._restore(given["state"])
        first = draws.randrange(self._num_calls[given["state"]])
        code, printed, seconds = forked(under_fire(first), log=self._log)
        told = {"file": f"call {first}", "seconds": round(seconds, 2), "said": printed[-3000:]}
        if code is None or "Traceback" in printed or code not in (0, 2):
            return {**told, "outcome": "hang" if code is None else "traceback"}
        if code == 2 and str(self.run) not in printed:
            return {**told, "outcome": "vague"}
        again, printed, _ = forked(lambda: command(self._settings), log=self._log)
        good = again == 0 and weights(self.run) == self._expected
        return {**told, "outcome": ("refused" if code == 2 else "went on") if good else "harm"}


def newest(names: list[str]) -> list[str]:
    """Without the files of older checkpoints, which are read only where the newest is damaged."""
    step_of = {name: Path(name).parts[2] for name in names if name.startswith("checkpoints/") and "/step-" in name}
    last = {Path(name).parts[1]: step for name, step in sorted(step_of.items(), key=lambda pair: pair[1])}
    return [name for name in names if name not in step_of or step_of[name] == last[Path(name).parts[1]]]


def skip_first_steps(run: Path) -> None:
    """Has both stages pass over their first step, as if it had spoilt the network."""
    for stage in ("teach", "distill"):
        write_skipped(run / "skipped" / f"{stage}.json", {0: "as if the gradient had been nan"})


def draw_images(folder: Path) -> None:
    """Some sixty drawn images of 32 px in three splits, and one that is broken."""
    from tools.make_sample_data import SampleSettings, draw_samples  # noqa: PLC0415  brings in much

    settings = SampleSettings(
        size=32, base_classes=3, val_classes=3, novel_classes=3, largest=12, smallest=8, evaluation=5, unlabelled=4
    )
    draw_samples(folder, settings=settings, seed=0)
    whole = next((folder / "base").glob("*/*.jpg"))
    whole.with_name("broken.jpg").write_bytes(whole.read_bytes()[:300])


def main() -> None:
    trials = Trials(Path(sys.argv[1]))
    for given in json.loads(Path(sys.argv[2]).read_text()):
        found = trials.files(given["list"]) if "list" in given else trials.trial(given)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    assert session  # imported for the forks
    main()
