"""Measures how long training stands still for a checkpoint, and what writing it beside training costs.

    python tools/bench_checkpoint.py --engines torch,zero1,zero2,zero3 --workers 1,2 --json

Trains a ViT (ViT-B/16 unless told otherwise: 86 M parameters, 1 GB of weights and Adam state) on random images, in
processes of this machine, and saves it as training does: a copy of the state, then a thread that writes, hashes and
flushes it. Each case prints a line; all numbers but the state's size are medians over the saves after the first, which
also takes the memory for the copy.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from dpkd.backends.engines import make_engine
from dpkd.backends.local_workers import LocalWorkers
from dpkd.engine import world
from dpkd.engine.protocol import Engine
from dpkd.engine.settings import EngineSettings, OptimizerSettings
from dpkd.engine.state import Writer
from dpkd.io.checkpoint_store import MANIFEST
from dpkd.launch.settings import LauncherSettings
from dpkd.models.parameters import parameter_groups
from dpkd.train.checkpoint import Checkpoints

STAGES: dict[str, Literal[0, 1, 2, 3] | None] = {"torch": None, "zero0": 0, "zero1": 1, "zero2": 2, "zero3": 3}
TARGET_S, TARGET_SHARE = 0.5, 0.035


@dataclass(frozen=True)
class Case:
    """One engine on so many workers; the options are those of the command."""

    engine: str
    workers: int
    options: argparse.Namespace
    folder: str


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Runs every case, prints a line for each, and returns what was measured."""
    options = _parser().parse_args(arguments)
    results = []
    for engine in options.engines.split(","):
        for workers in map(int, options.workers.split(",")):
            with tempfile.TemporaryDirectory(prefix="dpkd-checkpoint-", dir=options.folder) as folder:
                case = Case(engine, workers, options, folder)
                settings = LauncherSettings(max_restarts=0, threads=options.threads)
                LocalWorkers(workers, settings).run(work, case)
                results.append(_result(case))
            print(json.dumps(results[-1]) if options.json else _line(results[-1]), flush=True)
    return results


def work(case: Case) -> None:
    """One worker: trains, saves, and leaves its times in the folder."""
    peers, options = world.join(), case.options
    torch.manual_seed(0)
    engine = _engine(case, peers)
    timed = _Timed(engine)
    checkpoints = Checkpoints(Path(case.folder) / "checkpoints", world=peers, keep=options.saves)
    checkpoints.load_newest({"network": timed})
    shape = (options.batch_size, 3, options.image_size, options.image_size)
    image_BCHW = torch.randn(shape, device=peers.device)
    saves, step_times_s = [], []
    _step_s(engine, image_BCHW)  # makes the optimizer's state, and warms up
    for number in range(1, options.saves + 1):
        steps = []
        for _ in range(options.steps):
            began_s = time.time()
            steps.append((began_s, _step_s(engine, image_BCHW)))
        peers.barrier()  # what a rank waits for a slower one is no stall
        began_s = time.time()
        checkpoints.save(number * options.steps, {"network": timed})
        peers.barrier()
        saves.append({"began_s": began_s, "stall_s": time.time() - began_s, "snapshot_s": timed.snapshot_s})
        step_times_s.append(steps)
    checkpoints.finish()
    for save, write_s in zip(saves, timed.write_s, strict=True):
        save["write_s"] = write_s
    manifests = sorted(Path(case.folder, "checkpoints").glob(f"step-*/{MANIFEST}"))
    times = {"saves": saves, "steps": step_times_s, "published_s": [path.stat().st_mtime for path in manifests]}
    (Path(case.folder) / f"rank-{peers.rank}.json").write_text(json.dumps(times))
    peers.leave()


@dataclass
class _Timed:
    """An engine as a part of checkpoints, with the seconds that its copies and their writing took."""

    engine: Engine
    snapshot_s: float = 0.0
    write_s: list[float] = field(default_factory=list)

    def snapshot(self) -> Writer:
        began_s = time.perf_counter()
        write = self.engine.state.snapshot()
        self.snapshot_s = time.perf_counter() - began_s

        def timed_write(folder: Path) -> None:
            began_s = time.perf_counter()
            write(folder)
            self.write_s.append(time.perf_counter() - began_s)

        return timed_write

    def load(self, folder: Path) -> None:
        self.engine.state.load(folder)


def _engine(case: Case, peers: world.World) -> Engine:
    network: nn.Module = timm.create_model(case.options.model, img_size=case.options.image_size, num_classes=100)
    stage = STAGES[case.engine]
    settings = EngineSettings(kind="torch") if stage is None else EngineSettings(kind="deepspeed", zero_stage=stage)
    return make_engine(
        network,
        settings=settings,
        parameter_groups=parameter_groups(network, weight_decay=0.05, layer_decay=1.0),
        optimizer=OptimizerSettings(),
        world=peers,
        accumulation=1,
        micro_batch_size=case.options.batch_size,
        precision="fp32",
    )


def _step_s(engine: Engine, image_BCHW: Tensor) -> float:
    began_s = time.perf_counter()
    engine.backward(engine.forward(image_BCHW).square().mean())
    engine.step(learning_rate=1e-4)
    return time.perf_counter() - began_s


def _result(case: Case) -> dict[str, Any]:
    """The medians over the saves after the first; of ranks, the slowest."""
    ranks = [json.loads(path.read_text()) for path in sorted(Path(case.folder).glob("rank-*.json"))]
    published_s: list[float] = ranks[0]["published_s"]
    saves = [[rank["saves"][number] for rank in ranks] for number in range(case.options.saves)]
    stalls_s = [max(each["stall_s"] for each in save) for save in saves]
    copies_s = [max(each["snapshot_s"] for each in save) for save in saves]
    steps = ranks[0]["steps"]
    between_s = [sum(took_s for _, took_s in times) for times in steps[1:]]
    after = zip(published_s[:-1], steps[1:], strict=True)
    pairs = [(began_s < done_s, took_s) for done_s, times in after for began_s, took_s in times]
    busy_s = [took_s for is_busy, took_s in pairs if is_busy]
    quiet_s = [took_s for is_busy, took_s in pairs if not is_busy] or [took_s for _, took_s in steps[0]]
    manifest = json.loads(next(Path(case.folder, "checkpoints").glob(f"step-*/{MANIFEST}")).read_text())
    size = sum(facts["size_bytes"] for facts in manifest["files"].values())
    background_s = [
        done_s - save[0]["began_s"] - save[0]["stall_s"] for done_s, save in zip(published_s, saves, strict=True)
    ]
    stall_s, copy_s = median(stalls_s[1:]), median(copies_s[1:])
    quiet = median(quiet_s)
    return {
        "engine": case.engine,
        "workers": case.workers,
        "weights_mb": round(size / 1e6 / 3, 1),
        "state_mb": round(size / 1e6, 1),
        "stall_s": round(stall_s, 3),
        "worst_stall_s": round(max(stalls_s[1:]), 3),
        "first_stall_s": round(stalls_s[0], 3),
        "snapshot_s": round(copy_s, 3),
        "held_back_s": round(median([stall - copy for stall, copy in zip(stalls_s[1:], copies_s[1:], strict=True)]), 3),
        "snapshot_mb_per_s": round(size / case.workers / 1e6 / copy_s),
        "background_s": round(median(background_s), 3),
        "write_s": round(median([max(each["write_s"] for each in save) for save in saves]), 3),
        "background_mb_per_s": round(size / 1e6 / median(background_s)),
        "step_s": round(quiet, 3),
        "steps_while_writing": len(busy_s) // (case.options.saves - 1),
        "slow_down": round(median(busy_s) / quiet - 1, 3) if busy_s else None,
        "share_of_time_between_saves": round(stall_s / (stall_s + median(between_s)), 4),
        "seconds_between_saves_for_target": round(stall_s / TARGET_SHARE, 1),
        "load": os.getloadavg()[0],
    }


def _line(result: dict[str, Any]) -> str:
    verdict = (
        "met" if result["stall_s"] <= TARGET_S or result["share_of_time_between_saves"] <= TARGET_SHARE else "missed"
    )
    share = 100 * result["share_of_time_between_saves"]
    return (
        f"{result['engine']} on {result['workers']}: {result['state_mb']:,.0f} MB, a step held up for "
        f"{result['stall_s']:.2f} s ({share:.1f} % of the time between saves; target {verdict}), written in "
        f"{result['background_s']:.1f} s beside training"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="How long training stands still for a checkpoint.")
    parser.add_argument("--engines", default="torch,zero1,zero2,zero3", help=f"of {', '.join(STAGES)}")
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--model", default="vit_base_patch16_224", help="a ViT of timm")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8, help="images in a step of one worker")
    parser.add_argument("--saves", type=int, default=5, help="at least two; the first is not part of the medians")
    parser.add_argument("--steps", type=int, default=10, help="between two saves")
    parser.add_argument("--threads", type=int, default=1, help="of one worker")
    parser.add_argument("--folder", help="where checkpoints go; none takes the system's temporary folder")
    parser.add_argument("--json", action="store_true")
    return parser


if __name__ == "__main__":
    main()
