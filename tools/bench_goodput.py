"""Measures what is left of a run's time and steps when it is preempted: the shape of Ray Train's preemption benchmark.

    python tools/bench_goodput.py --json

Ray's (ray-project/ray, pull request 65047): ViT-B/16, 8 workers, 1,600 steps of 1.13 s, a checkpoint every 400, four
preemptions. Here a small ViT on the CPU takes as many steps and preemptions, in shorter steps, so that a restart weighs
more. Two ways to be preempted:

    stop    SIGTERM to the command, as a cluster sends before it takes a machine: it saves, ends, and is submitted again
    kill    SIGKILL to a training process, without a warning: what was done since the last save is lost

Step goodput is steps that count over steps done, as in Ray's numbers. Time goodput is training's share of all time
from the first submission to the last exit; each preemption's cost stands beside it.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpkd.log import EventReader
from dpkd.report.goodput import TimeAccount
from tools.make_sample_data import SampleSettings, draw_samples

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = SampleSettings(
    size=48, base_classes=6, val_classes=5, novel_classes=5, largest=32, smallest=8, evaluation=22, unlabelled=16
)
EXIT_STOPPED = 75
RAY = {"interval": 1600 / 2117, "just in time": 1600 / 1691}


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Runs every way to be preempted, prints a line for each, and returns what was measured."""
    options = _parser().parse_args(arguments)
    found = []
    with tempfile.TemporaryDirectory(prefix="dpkd-goodput-") as name:
        folder = Path(name)
        draw_samples(folder / "sample", settings=SAMPLES, seed=0)
        packed = Submission(folder / "packed", _settings(folder, options, every=1), stages="pack,prepare")
        packed.wait(codes=(0,))
        for way in options.ways.split(","):
            kind, _, every = way.partition(":")
            tree = _settings(folder, options, every=int(every or options.checkpoint_every))
            tree["data"] |= {"source": None, "shards": str(folder / "packed" / "shards")}
            tree["run"]["dir"] = str(folder / way.replace(":", "-"))
            result = {"way": kind, "checkpoint_every": int(every or options.checkpoint_every)} | _measure(
                kind, tree, options
            )
            found.append(result)
            print(json.dumps(result) if options.json else _line(result), flush=True)
    return found


class Submission:
    """One submission of the command, and the events of its run."""

    def __init__(self, run: Path, tree: dict[str, Any], *, stages: str) -> None:
        run.parent.mkdir(parents=True, exist_ok=True)
        config = run.with_suffix(".json")
        config.write_text(json.dumps(tree | {"run": {"dir": str(run)}}))
        command = [sys.executable, "-m", "dpkd.pretrain", "--config", str(config), "--stages", stages]
        self._log = run.with_suffix(".log")
        self._run = run
        self._reader = EventReader(run / "events.jsonl")
        with self._log.open("a") as log:
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def wait_for(self, *, step: int, after_s: float = 0.0) -> float:
        """Returns the time at which this step, or a later one, was done; `after_s` leaves earlier events out."""
        while True:
            for event in self._reader.new():
                if event["kind"] == "spent" and event["step"] >= step and event["time"] > after_s:
                    return float(event["time"])
            if self.process.poll() is not None:
                raise RuntimeError(f"it ended with code {self.process.returncode}: {self._log.read_text()[-3000:]}")
            time.sleep(0.02)

    def wait(self, *, codes: Sequence[int]) -> None:
        """Waits for its end, with one of these codes."""
        if self.process.wait() not in codes:
            raise RuntimeError(f"it ended with code {self.process.returncode}: {self._log.read_text()[-3000:]}")

    def kill_worker(self) -> None:
        """SIGKILL to its last training process, which its watchdog was told."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                words = path.read_bytes().decode().split("\0")
                if "dpkd.launch.watchdog" in words and str(self._run / "hangs") in words:
                    _, _, _, rank, process = words[words.index("dpkd.launch.watchdog") + 1 :][:5]
                    found[int(rank)] = int(process)
        os.kill(found[max(found)], signal.SIGKILL)


def _measure(way: str, tree: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """One run, preempted at drawn steps."""
    run = Path(tree["run"]["dir"])
    steps = preempted_steps(options.steps, options.preemptions, seed=options.seed)
    recoveries_s = []
    began_s = time.time()
    submission = Submission(run, tree, stages="teach")
    for step in steps:
        submission.wait_for(step=step)
        hit_s = time.time()
        if way == "stop":
            submission.process.terminate()
            submission.wait(codes=(EXIT_STOPPED,))
            submission = Submission(run, tree, stages="teach")
        else:
            submission.kill_worker()
            _wait_for_restart(run, hit_s)
        recoveries_s.append(submission.wait_for(step=0, after_s=_loop_began_s(run, submission, hit_s)) - hit_s)
    submission.wait(codes=(0,))
    return _result(run, wall_s=time.time() - began_s, steps=steps, recoveries_s=recoveries_s, options=options)


def _wait_for_restart(run: Path, hit_s: float) -> None:
    reader = EventReader(run / "events.jsonl")
    while not any(event["kind"] == "restart" and event["time"] > hit_s for event in reader.new()):
        time.sleep(0.02)


def _loop_began_s(run: Path, submission: Submission, hit_s: float) -> float:
    """When training began again after this time."""
    reader = EventReader(run / "events.jsonl")
    while submission.process.poll() is None:
        for event in reader.new():
            if event["kind"] == "loop_began" and event["time"] > hit_s:
                return float(event["time"])
        time.sleep(0.02)
    raise RuntimeError("the run ended instead of going on")


def preempted_steps(steps: int, preemptions: int, *, seed: int) -> list[int]:
    """The steps after which the run is preempted: one drawn in each of as many equal parts, the ends left out."""
    draw = random.Random(seed)
    length = steps // preemptions
    return [part * length + draw.randrange(length // 10, length - length // 10) for part in range(preemptions)]


def _result(
    run: Path, *, wall_s: float, steps: list[int], recoveries_s: list[float], options: argparse.Namespace
) -> dict[str, Any]:
    found = TimeAccount(EventReader(run / "events.jsonl").new())
    spent = {name: round(ms / 1000, 2) for name, ms in found.milliseconds.items() if ms}
    step_s = found.milliseconds["training"] / 1000 / found.steps
    recovery_s = statistics.mean(recoveries_s)
    return {
        "steps": found.steps,
        "lost_steps": found.lost_steps,
        "step_goodput": round(found.step_goodput, 4),
        "wall_s": round(wall_s, 1),
        "time_goodput": round(found.milliseconds["training"] / 1000 / wall_s, 4),
        "shares": {name: round(share, 4) for name, share in found.shares.items() if share},
        "seconds": spent,
        "step_s": round(step_s, 4),
        "preempted_after": steps,
        "recovery_s": [round(each, 2) for each in recoveries_s],
        "mean_recovery_s": round(recovery_s, 2),
        "attempts": found.attempts,
        "restarts": found.restarts,
        "workers": options.workers,
        "load": os.getloadavg()[0],
    }


def _settings(folder: Path, options: argparse.Namespace, *, every: int) -> dict[str, Any]:
    size = {"img_size": 48, "patch_size": 8}
    student = {"model": {"name": "resnet18"}}
    return {
        "run": {"dir": str(folder / "packed")},
        "launcher": {"kind": "local", "workers": options.workers, "threads": options.threads},
        "data": {
            "source": str(folder / "sample"),
            "train": "base",
            "val": "val",
            "test": "novel",
            "image_size": 48,
            "loader": {"workers": options.loader_workers},
        },
        "prepare": {"priors": []},
        "teach": {
            "model": {"name": "vit_small_patch16_224", "arguments": size},
            "training": {
                "steps": options.steps,
                "batch_size": options.batch_size,
                "precision": "fp32",
                "log_every": 1,
                "checkpoint_every": every,
                "evaluate_every": 10 * options.steps,
                "panels_every": 10 * options.steps,
            },
            "engine": {"kind": "torch"},
        },
        "distill": {"students": {"student": student}},
        "evaluate": {"episodes": {"queries": 5}},
    }


def _line(result: dict[str, Any]) -> str:
    rays = ", ".join(f"{100 * share:.1f} % {name}" for name, share in RAY.items())
    return (
        f"{result['way']}, a save every {result['checkpoint_every']} steps: step goodput "
        f"{100 * result['step_goodput']:.1f} % ({result['lost_steps']} steps lost; Ray Train {rays}), time goodput "
        f"{100 * result['time_goodput']:.1f} % of {result['wall_s']:.0f} s, "
        f"{result['mean_recovery_s']:.1f} s a preemption"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Goodput of a run that is preempted.")
    parser.add_argument("--ways", default="stop:400,kill:10", help="stop or kill, with the steps between two saves")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--preemptions", type=int, default=4)
    parser.add_argument("--checkpoint-every", type=int, default=400, help="where a way does not say")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of one worker")
    parser.add_argument("--loader-workers", type=int, default=0, help="of one worker; 0 reads in the worker itself")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help="of the steps at which it is preempted")
    parser.add_argument("--json", action="store_true")
    return parser


if __name__ == "__main__":
    main()
