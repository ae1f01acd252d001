"""Measures the seconds from a fault to the next logged step: a killed worker, a stopped one, a node lost and regained.

    python tools/bench_recovery.py --launcher local --fault kill
    python tools/bench_recovery.py --launcher ray --fault stop --hang-timeout-s 5
    python tools/bench_recovery.py --launcher ray --fault node

Draws a small data set into a temporary folder, trains a small teacher on it with two workers, hits the second one after
some steps, and prints a line a fault. On Ray it starts a cluster of two nodes on this machine; the fault `node` kills
the second one, with which the run shrinks to one worker, and starts another, with which it grows to two again.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tools.local_ray_cluster import LocalCluster
from tools.make_sample_data import SampleSettings, draw_samples

ROOT = Path(__file__).resolve().parents[1]
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
SAMPLES = SampleSettings(
    size=48, base_classes=6, val_classes=5, novel_classes=5, largest=32, smallest=8, evaluation=22, unlabelled=16
)
TEACHER = {
    "model": {"name": "resnet18", "arguments": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}},
    "training": {"steps": 100_000, "batch_size": 16, "log_every": 1, "checkpoint_every": 20, "evaluate_every": 100_000},
    "engine": {"kind": "torch"},
}


def main() -> None:
    """Runs one training session and prints what each fault cost."""
    parser = argparse.ArgumentParser(description="Seconds from a fault to the next step.")
    parser.add_argument("--launcher", choices=("local", "ray"), default="local")
    parser.add_argument("--fault", choices=(*SIGNALS, "node"), default="kill")
    parser.add_argument("--faults", type=int, default=3, help="how many, one after the other")
    parser.add_argument("--hang-timeout-s", type=float, default=5.0)
    options = parser.parse_args()
    if options.fault == "node" and options.launcher == "local":
        parser.error("--fault node needs --launcher ray")
    with tempfile.TemporaryDirectory(prefix="dpkd-recovery-") as name, _cluster(options.launcher) as cluster:
        folder = Path(name)
        draw_samples(folder / "sample", settings=SAMPLES, seed=0)
        config = folder / "run.json"
        config.write_text(json.dumps(_settings(folder, options.launcher, options.hang_timeout_s)))
        command = [sys.executable, "-m", "dpkd.pretrain", "--config", str(config), "--stages", "pack,prepare,teach"]
        variables = cluster.client_variables() if cluster is not None else {}
        environment = os.environ | variables | {"PYTHONPATH": str(ROOT)}
        log = (folder / "log").open("w")
        driver = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            for place in range(1, options.faults + 1):
                if cluster is not None and options.fault == "node":
                    print(_one_fault(folder / "run", driver, partial(cluster.kill_node, place)), flush=True)
                    print(_one_fault(folder / "run", driver, partial(cluster.add_node, 1)), flush=True)
                else:
                    signal_worker = partial(_signal_second_worker, folder / "run", SIGNALS[options.fault])
                    print(_one_fault(folder / "run", driver, signal_worker), flush=True)
        finally:
            driver.terminate()
            driver.wait()
            print((folder / "log").read_text()[-2000:], file=sys.stderr)


def _settings(folder: Path, launcher: str, hang_timeout_s: float) -> dict[str, Any]:
    return {
        "run": {"dir": str(folder / "run")},
        "launcher": {
            "kind": launcher,
            "workers": 2,
            "min_workers": 1 if launcher == "ray" else None,
            "grow_after_s": 0.0,
            "threads": 1,
            "hang_timeout_s": hang_timeout_s,
        },
        "data": {
            "source": str(folder / "sample"),
            "train": "base",
            "val": "val",
            "test": "novel",
            "image_size": 32,
            "loader": {"workers": 0},
        },
        "prepare": {"priors": []},
        "teach": TEACHER,
        "distill": {"students": {"student": {"model": TEACHER["model"]}}},
        "evaluate": {"episodes": {"queries": 5}},
    }


def _one_fault(run: Path, driver: subprocess.Popen[bytes], hit: Callable[[], object]) -> str:
    """Waits until training is under way, hits it, and tells what went by until the next step."""
    before = len(_events(run, "train"))
    _wait(lambda: len(_events(run, "train")) >= before + 40, driver)
    restarts = len(_events(run, "restart"))
    hit()
    hit_s = time.time()
    _wait(lambda: len(_events(run, "restart")) > restarts, driver)
    restart = _events(run, "restart")[-1]
    _wait(lambda: _events(run, "train")[-1]["time"] > restart["time"], driver)
    *_, last = (each for each in _events(run, "train") if each["time"] < restart["time"])
    step = next(each for each in _events(run, "train") if each["time"] > restart["time"])
    return (
        f"{step['time'] - hit_s:.1f} s: {restart['time'] - hit_s:.1f} s until the restart was decided, "
        f"{step['time'] - restart['time']:.1f} s until the next step, {step['time'] - last['time']:.1f} s without one, "
        f"{last['step'] + 1 - step['step']} steps lost ({restart['cause'][:60]})"
    )


def _signal_second_worker(run: Path, number: int) -> None:
    os.kill(_second_worker(run), number)


def _second_worker(run: Path) -> int:
    """The process of rank 1, as its watchdog was told it."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().decode().split("\0")
            if "dpkd.launch.watchdog" in words and str(run / "hangs") in words:
                _, _, _, rank, process = words[words.index("dpkd.launch.watchdog") + 1 :][:5]
                if rank == "1":
                    return int(process)
    raise RuntimeError("no watchdog of the second worker is running")


def _events(run: Path, kind: str) -> list[dict[str, Any]]:
    path = run / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [each for each in (json.loads(line) for line in lines if line.endswith("}")) if each["kind"] == kind]


def _wait(fact: Any, driver: subprocess.Popen[bytes]) -> None:
    while not fact():
        if driver.poll() is not None:
            raise RuntimeError(f"the run ended with code {driver.returncode}")
        time.sleep(0.1)


@contextlib.contextmanager
def _cluster(launcher: str) -> Iterator[LocalCluster | None]:
    if launcher == "local":
        yield None
        return
    with LocalCluster([1, 1], environment={"PYTHONPATH": str(ROOT)}) as cluster:
        yield cluster


if __name__ == "__main__":
    main()
