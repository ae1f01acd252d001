"""Measures the seconds from a fault to the next logged step: a killed worker, a stopped one, a node lost and regained.

    python -m tools.bench_recovery --launcher local --fault kill
    python -m tools.bench_recovery --launcher ray --fault stop --hang-timeout-s 5
    python -m tools.bench_recovery --launcher ray --fault node

Draws a small data set into a temporary folder, trains a small teacher on it with two workers, hits the second one after
some steps, and prints a line a fault. On Ray it starts a cluster of two nodes on this machine; the fault `node` kills
the second one, with which the run shrinks to one worker, and starts another, with which it grows to two again.
"""

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from tools.bench_goodput import ROOT, SAMPLES, Submission, run_settings
from tools.local_ray_cluster import LocalCluster
from tools.make_sample_data import draw_samples

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
TEACHER = {
    "model": {"name": "resnet18", "arguments": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}},
    "training": {"steps": 100_000, "batch_size": 16, "log_every": 1, "checkpoint_every": 20, "evaluate_every": 100_000},
}


def main() -> None:
    """Runs one training session and prints what each fault cost."""
    parser = argparse.ArgumentParser(description="Seconds from a fault to the next step.")
    parser.add_argument("--launcher", choices=("local", "ray"), default="local")
    parser.add_argument("--fault", choices=(*SIGNALS, "node"), default="kill")
    parser.add_argument("--faults", type=int, default=3, help="how many, one after the other")
    parser.add_argument("--hang-timeout-s", type=float, default=5.0)
    options = parser.parse_args()
    on_ray = options.launcher == "ray"
    if options.fault == "node" and not on_ray:
        parser.error("--fault node needs --launcher ray")
    launcher = {"kind": options.launcher, "workers": 2, "min_workers": 1 if on_ray else None, "grow_after_s": 0.0}
    launcher |= {"hang_timeout_s": options.hang_timeout_s}
    nodes = LocalCluster([1, 1], environment={"PYTHONPATH": str(ROOT)}) if on_ray else nullcontext()
    with tempfile.TemporaryDirectory(prefix="dpkd-recovery-") as name, nodes as cluster:
        run, sample = Path(name) / "run", Path(name) / "sample"
        draw_samples(sample, settings=SAMPLES, seed=0)
        tree = run_settings(run, sample, launcher=launcher, teacher=TEACHER, image_size=32)
        variables = cluster.client_variables() if cluster is not None else {}
        submission = Submission(tree, stages="pack,prepare,teach", environment=variables)
        try:
            for place in range(1, options.faults + 1):
                if cluster is not None and options.fault == "node":
                    print(_one_fault(submission, partial(cluster.kill_node, place)), flush=True)
                    print(_one_fault(submission, partial(cluster.add_node, 1)), flush=True)
                else:
                    hit = partial(submission.signal_last_worker, SIGNALS[options.fault])
                    print(_one_fault(submission, hit), flush=True)
        finally:
            submission.process.terminate()
            submission.process.wait()
            print(submission.log.read_text()[-2000:], file=sys.stderr)


def _one_fault(run: Submission, hit: Callable[[], object]) -> str:
    """Waits until training is under way, hits it, and says what went by until the next step."""
    before = len(run.events("train"))
    run.wait_until(lambda: len(run.events("train")) >= before + 40)
    began_s = time.time()
    hit()
    hit_s = time.time()
    restart = run.first("restart", after_s=began_s)
    step = run.first("train", after_s=restart["time"])
    last = [event for event in run.events("train") if event["time"] < restart["time"]][-1]
    return (
        f"{step['time'] - hit_s:.1f} s: {restart['time'] - hit_s:.1f} s until the restart was decided, "
        f"{step['time'] - restart['time']:.1f} s until the next step, {step['time'] - last['time']:.1f} s without one, "
        f"{last['step'] + 1 - step['step']} steps lost ({restart['cause'][:60]})"
    )


if __name__ == "__main__":
    main()
