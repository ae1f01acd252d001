"""Measures starting and opening: CPU seconds of commands, of a run until its first step, and of opening large splits.

    python -m tools.bench_start [--json] [--parts commands,step] [--beside CHECKOUT]

`commands` are `dpkd --help`, `dpkd plan --fast` and `dpkd plan` beside the imports of torch and timm, in turns.
`step` trains a small teacher and a student on shards that exist, until the first step is logged; the CPU time is that
of all processes of the run, and of each kind of them.
`--beside` measures another checkout too, in turns with this one. CPU time is user and system, with child processes.
"""

import argparse
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tools.bench_goodput import ROOT, SAMPLES, run_settings
from tools.make_sample_data import draw_samples

BARE = "import torch, timm"
COMMANDS = {
    BARE: ["-c", BARE],
    "import dpkd": ["-c", "import dpkd"],
    "dpkd --help": ["-m", "dpkd.cli", "--help"],
    "dpkd plan --fast": ["-m", "dpkd.cli", "plan", "--fast", "--config"],
    "dpkd plan": ["-m", "dpkd.cli", "plan", "--config"],
}
MODEL = {"name": "resnet18", "arguments": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}}
TRAINING = {"steps": 1, "batch_size": 16, "log_every": 1, "evaluate_every": 1000, "panels_every": 1000}
KINDS = {"dpkd.data.stream": "loader", "dpkd.stages": "training", "watchdog": "watchdog", "resource_tracker": "tracker"}
"""Processes of a run by a part of their command."""
TICKS_PER_S = os.sysconf("SC_CLK_TCK")

Turn = Callable[[Path], dict[str, float]]
"""Measures one checkout once: seconds or MB by name."""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the parts, prints a line for each figure or all as JSON, and returns them."""
    parser = argparse.ArgumentParser(description="CPU seconds of starting and opening.")
    parser.add_argument("--parts", default="commands,step")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--beside", type=Path, action="append", default=[], help="another checkout, measured in turns")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    results: dict[str, Any] = {"load": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory(prefix="dpkd-start-") as name:
        folder = Path(name)
        draw_samples(folder / "sample", settings=SAMPLES, seed=0)
        config = folder / "settings.json"
        config.write_text(json.dumps(_settings(folder / "run", folder / "sample")))
        turns: dict[str, Turn] = {}
        if "commands" in options.parts:
            turns["commands"] = lambda checkout: _commands(checkout, config)
        if "step" in options.parts:
            turns["step"] = lambda checkout: _first_step(checkout, folder)
        for part, turn in turns.items():
            measured: dict[Path, list[dict[str, float]]] = {checkout: [] for checkout in [ROOT, *options.beside]}
            for _ in range(options.repeats):
                for checkout, figures in measured.items():
                    figures.append(turn(checkout.resolve()))
            for checkout, figures in measured.items():
                medians = {key: statistics.median(figure.get(key, 0.0) for figure in figures) for key in figures[0]}
                results[f"{part} of {checkout.resolve().name}"] = {key: round(at, 3) for key, at in medians.items()}
    print(json.dumps(results, indent=1) if options.json else _table(results))
    return results


def _table(results: dict[str, Any]) -> str:
    lines = []
    for part, figures in results.items():
        for name, value in figures.items() if isinstance(figures, dict) else (("", figures),):
            over = f"  {value / figures[BARE]:6.3f} of {BARE}" if name and BARE in figures else ""
            lines.append(f"{part:<32} {name:<28} {value:9.3f}{over}")
    return "\n".join(lines)


def _settings(run: Path, sample: Path) -> dict[str, Any]:
    teacher = {"model": MODEL, "training": TRAINING}
    launcher = {"kind": "local", "workers": 1}
    tree = run_settings(run, sample, launcher=launcher, teacher=teacher, image_size=48, loader_workers=1)
    tree["prepare"] = {"priors": [{"kind": "edge"}, {"kind": "saliency"}]}
    tree["distill"] = {"students": {"student": {"model": MODEL}}, "training": TRAINING}
    return tree


def _variables(checkout: Path) -> dict[str, str]:
    """The environment of a command of this checkout, which keeps its bytecode as an installed package does."""
    unset = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return unset | {"PYTHONPATH": str(checkout)}


def _run(checkout: Path, arguments: Sequence[str]) -> float:
    """CPU seconds of a Python process and of the children that it has waited for."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, *arguments], cwd=checkout, env=_variables(checkout), check=True, capture_output=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _commands(checkout: Path, config: Path) -> dict[str, float]:
    """CPU seconds of each command; a checkout without `--fast` has none for it."""
    seconds = {}
    for name, arguments in COMMANDS.items():
        try:
            seconds[name] = _run(checkout, [*arguments, str(config)] if arguments[-1] == "--config" else arguments)
        except subprocess.CalledProcessError:
            assert name == "dpkd plan --fast", name
    return seconds


def _first_step(checkout: Path, folder: Path) -> dict[str, float]:
    """Wall and CPU seconds from the command to the first logged step, of all processes and of each kind."""
    run, packed, config = (
        folder / f"step-{time.monotonic_ns()}",
        folder / f"packed-{checkout.name}",
        folder / "step.json",
    )
    if not packed.exists():
        config.write_text(json.dumps(_settings(packed, folder / "sample")))
        _run(checkout, ["-m", "dpkd.pretrain", "--config", str(config), "--stages", "pack,prepare"])
    tree = _settings(run, folder / "sample")
    tree["data"] |= {"source": None, "shards": str(packed / "shards")}
    config.write_text(json.dumps(tree))
    command = [sys.executable, "-m", "dpkd.pretrain", "--config", str(config), "--stages", "teach"]
    began_s = time.monotonic()
    with run.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=checkout, env=_variables(checkout), stdout=log, stderr=log, start_new_session=True
        )
        events = run / "events.jsonl"
        while not (events.exists() and b'"kind": "train"' in events.read_bytes()):
            assert process.poll() is None, run.with_suffix(".log").read_text()[-2000:]
            time.sleep(0.01)
        figures = {"wall": time.monotonic() - began_s} | _session(process.pid)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return figures


def _session(leader: int) -> dict[str, float]:
    """CPU seconds of the living processes of a session and of the children that they waited for, by kind."""
    seconds: dict[str, float] = defaultdict(float)
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            command = (path / "cmdline").read_bytes().decode(errors="replace")
        except OSError:  # it has ended
            continue
        if int(fields[3]) == leader:
            spent = sum(map(int, fields[11:15])) / TICKS_PER_S
            seconds["cpu"] += spent
            # a forked worker has the command of its fork server
            seconds[next((f"cpu of {kind}" for part, kind in KINDS.items() if part in command), "cpu of driver")] += (
                spent
            )
    return dict(seconds)


if __name__ == "__main__":
    main()
