"""Measures what is left of a run's time and steps when it is preempted: the shape of Ray Train's preemption benchmark.

    python -m tools.bench_goodput --json

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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from dpkd.log import EventReader
from dpkd.report.goodput import TimeAccount
from tools.make_sample_data import SampleSettings, draw_samples

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = SampleSettings(
    size=48, base_classes=6, val_classes=5, novel_classes=5, largest=32, smallest=8, evaluation=22, unlabelled=16
)
EXIT_STOPPED = 75
RAY = {"interval": 1600 / 2117, "just in time": 1600 / 1691}

Answer = TypeVar("Answer")
Event = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Runs every way to be preempted, prints a line for each, and returns what was measured."""
    options = _parser().parse_args(arguments)
    results = []
    with tempfile.TemporaryDirectory(prefix="dpkd-goodput-") as name:
        folder = Path(name)
        draw_samples(folder / "sample", settings=SAMPLES, seed=0)
        packed = _settings(folder / "packed", folder / "sample", options, every=1)
        Submission(packed, stages="pack,prepare").wait(codes=(0,))
        for way in options.ways.split(","):
            kind, _, steps = way.partition(":")
            every = int(steps or options.checkpoint_every)
            tree = _settings(folder / way.replace(":", "-"), folder / "sample", options, every=every)
            tree["data"] |= {"source": None, "shards": str(folder / "packed" / "shards")}
            results.append({"way": kind, "checkpoint_every": every} | _measure(kind, tree, options))
            print(json.dumps(results[-1]) if options.json else _line(results[-1]), flush=True)
    return results


class Submission:
    """One submission of the command, and the events of its run."""

    def __init__(self, tree: dict[str, Any], *, stages: str, environment: Mapping[str, str] | None = None) -> None:
        self._run = Path(tree["run"]["dir"])
        self._events: list[Event] = []
        self._reader = EventReader(self._run / "events.jsonl")
        self.log = self._run.with_suffix(".log")
        config = self._run.with_suffix(".json")
        config.write_text(json.dumps(tree))
        command = [sys.executable, "-m", "dpkd.pretrain", "--config", str(config), "--stages", stages]
        with self.log.open("a") as log:
            variables = os.environ | {"PYTHONPATH": str(ROOT)} | dict(environment or {})
            self.process = subprocess.Popen(command, env=variables, stdout=log, stderr=subprocess.STDOUT)

    def events(self, kind: str) -> list[Event]:
        """The events of a kind so far, those of earlier submissions too."""
        self._events += self._reader.new()
        return [event for event in self._events if event["kind"] == kind]

    def wait_until(self, fact: Callable[[], Answer]) -> Answer:
        """The answer once it is no empty one; raises `RuntimeError` where the run ends before."""
        while not (answer := fact()):
            if self.process.poll() is not None:
                raise RuntimeError(f"it ended with code {self.process.returncode}: {self.log.read_text()[-3000:]}")
            time.sleep(0.02)
        return answer

    def first(self, kind: str, *, step: int = 0, after_s: float = 0.0) -> Event:
        """The first event of a kind after a time, of this step or a later one; waits for it."""

        def found() -> list[Event]:
            events = self.events(kind)
            return [event for event in events if event["time"] > after_s and event.get("step", step) >= step]

        return self.wait_until(found)[0]

    def wait(self, *, codes: Sequence[int]) -> None:
        """Waits for its end, with one of these codes."""
        if self.process.wait() not in codes:
            raise RuntimeError(f"it ended with code {self.process.returncode}: {self.log.read_text()[-3000:]}")

    def signal_last_worker(self, number: int) -> None:
        """Sends a signal to its last training process, which its watchdog names."""
        workers = {}
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                words = path.read_bytes().decode().split("\0")
                if "dpkd.launch.watchdog" in words and str(self._run / "hangs") in words:
                    _, _, _, rank, process = words[words.index("dpkd.launch.watchdog") + 1 :][:5]
                    workers[int(rank)] = int(process)
        os.kill(workers[max(workers)], number)


def _measure(way: str, tree: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """One run, preempted at drawn steps."""
    steps = preempted_steps(options.steps, options.preemptions, seed=options.seed)
    recoveries_s = []
    began_s = time.time()
    submission = Submission(tree, stages="teach")
    for step in steps:
        submission.first("spent", step=step)
        hit_s = time.time()
        if way == "stop":
            submission.process.terminate()
            submission.wait(codes=(EXIT_STOPPED,))
            submission = Submission(tree, stages="teach")
        else:
            submission.signal_last_worker(signal.SIGKILL)
        loop = submission.first("loop_began", after_s=hit_s)
        recoveries_s.append(submission.first("spent", after_s=loop["time"])["time"] - hit_s)
    submission.wait(codes=(0,))
    account = TimeAccount(EventReader(Path(tree["run"]["dir"]) / "events.jsonl").new())
    wall_s, training_s = time.time() - began_s, account.milliseconds["training"] / 1000
    return {
        "steps": account.steps,
        "lost_steps": account.lost_steps,
        "step_goodput": round(account.step_goodput, 4),
        "wall_s": round(wall_s, 1),
        "time_goodput": round(training_s / wall_s, 4),
        "shares": {name: round(share, 4) for name, share in account.shares.items() if share},
        "seconds": {name: round(ms / 1000, 2) for name, ms in account.milliseconds.items() if ms},
        "step_s": round(training_s / account.steps, 4),
        "preempted_after": steps,
        "recovery_s": [round(recovery_s, 2) for recovery_s in recoveries_s],
        "mean_recovery_s": round(statistics.mean(recoveries_s), 2),
        "attempts": account.attempts,
        "restarts": account.restarts,
        "workers": options.workers,
        "load": os.getloadavg()[0],
    }


def preempted_steps(steps: int, preemptions: int, *, seed: int) -> list[int]:
    """The steps after which the run is preempted: one drawn in each of as many equal parts, the ends left out."""
    draw = random.Random(seed)
    length = steps // preemptions
    return [part * length + draw.randrange(length // 10, length - length // 10) for part in range(preemptions)]


def run_settings(
    run: Path,
    sample: Path,
    *,
    launcher: dict[str, Any],
    teacher: dict[str, Any],
    image_size: int,
    loader_workers: int = 0,
) -> dict[str, Any]:
    """Settings of a run that packs the samples, prepares no prior, and trains a teacher."""
    loader = {"workers": loader_workers}
    splits = {"train": "base", "val": "val", "test": "novel"}
    return {
        "run": {"dir": str(run)},
        "launcher": {"threads": 1} | launcher,
        "data": {"source": str(sample), "image_size": image_size, "loader": loader} | splits,
        "prepare": {"priors": []},
        "teachers": {"teacher": teacher | {"objectives": [{"kind": "supervised"}], "engine": {"kind": "torch"}}},
        "distill": {"students": {"student": {"model": "resnet18"}}},
        "evaluate": {"episodes": {"queries": 5}},
    }


def _settings(run: Path, sample: Path, options: argparse.Namespace, *, every: int) -> dict[str, Any]:
    never = {"evaluate_every": 10 * options.steps, "panels_every": 10 * options.steps}
    length = {"steps": options.steps, "batch_size": options.batch_size, "checkpoint_every": every}
    teacher = {
        "model": {"name": "vit_small_patch16_224", "arguments": {"img_size": 48, "patch_size": 8}},
        "training": length | never | {"precision": "fp32", "log_every": 1},
    }
    launcher = {"kind": "local", "workers": options.workers, "threads": options.threads}
    return run_settings(
        run, sample, launcher=launcher, teacher=teacher, image_size=48, loader_workers=options.loader_workers
    )


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
