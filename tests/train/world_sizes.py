"""Trains a teacher and a student, each in an engine of its own, at one world size after another, in real processes.

    python -m tests.train.world_sizes FOLDER FILE.json

runs the trials of the list in the file and prints a line of JSON for each. A trial is
{"segments": [{"size": 2, "engines": ["zero3", "zero1"], "end": 9, "kill": false}, …], "student": "adamw"}: each
segment goes on from the newest checkpoint with so many ranks, over gloo, and these engines. It is stopped after step
`end`, and saves, or is killed in the step after it; the last one ends with the run. With "poison", {"step", "rank",
"network", "factor"}, that network's loss is so many times itself there. What the last checkpoint holds is compared with
that of the unbroken run that the trial's "unbroken" names, {"size", "engines", "skipped"}, which passes over the last
from the start.

The segments of its "passes" come after that and do not train: each loads the newest checkpoint and saves it again,
which must change no bit.

One process imports torch and DeepSpeed and forks for every rank, which costs milliseconds.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # optimizers load it at their first step: better once here than in every fork
from torch import nn

from dpkd.backends.deepspeed_engine import DeepSpeedEngine, import_deepspeed
from dpkd.data.batch import Batch, View
from dpkd.data.order import Order, rank_slice
from dpkd.engine import world as peers
from dpkd.engine.protocol import Engine
from dpkd.engine.settings import EngineSettings, OptimizerSettings, TrainingSettings
from dpkd.engine.state import StateReader
from dpkd.engine.torch_engine import TorchEngine
from dpkd.engine.world import World
from dpkd.errors import StopRequested
from dpkd.io.checkpoint_store import CheckpointStore
from dpkd.train.checkpoint import Checkpoints
from dpkd.train.divergence import NormGuard, read_skipped, train_past_divergence, write_skipped
from dpkd.train.loop import Plan, train
from dpkd.train.meter import Meter
from dpkd.train.parts import RandomState
from dpkd.train.sample_log import SampleLog, read_history
from dpkd.verbs.audit import judge
from tests.chaos.storage_faults import fork_ranks, wait_for
from tests.engine_cases import STAGE, Net

BATCH, MICRO, LAST, SAVED_EVERY = 12, 2, 24, 5
ORDER = Order([13, 9, 8], seed=3, global_batch_size=BATCH, block_shards=2)
OPTIMIZERS = {
    "adamw": OptimizerSettings(clip=0.5, weight_decay=0.1),
    "sgd": OptimizerSettings(kind="sgd", clip=None, weight_decay=0.1, momentum=0.9),
}
LEARNING_RATE = {"adamw": 1e-3, "sgd": 1e-2}
NAMES = ("teacher", "student")
SKIPPED = "skipped.json"
SPIKE = TrainingSettings(steps=LAST).spike


def groups(module: nn.Module) -> list[dict[str, Any]]:
    """Four groups that differ in weight decay and rate, most of several parameters; the frozen stem in none."""
    found: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        decay, scale = (0.1 if parameter.ndim > 1 else 0.0), (0.5 if name.startswith("wide") else 1.0)
        group = found.setdefault((decay, scale), {"params": [], "names": [], "weight_decay": decay, "lr_scale": scale})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(found.values())


def build(kind: str, world: World, *, seed: int, optimizer: str, ema: float | None) -> Engine:
    """An engine of this kind over the small network of the engines' contract test."""
    module = Net(seed=seed)
    parts: dict[str, Any] = {
        "parameter_groups": groups(module),
        "optimizer": OPTIMIZERS[optimizer],
        "settings": EngineSettings(zero_stage=STAGE[kind] or 0, ema=ema),
        "world": world,
        "accumulation": BATCH // MICRO // world.size,
        "micro_batch_size": MICRO,
        "precision": "fp32",
    }
    return TorchEngine(module, **parts) if STAGE[kind] is None else DeepSpeedEngine(module, **parts)


class Distilling:
    """The teacher learns labels, the student the teacher's logits; ends its process where the segment says."""

    def __init__(self, segment: Mapping[str, Any], world: World, *, student: str) -> None:
        self._end, self._kill, self._rank = segment["end"], segment.get("kill", False), world.rank
        self._poison = segment.get("poison", {"step": -1})
        teacher, other = segment["engines"]
        self._optimizer = {"teacher": "adamw", "student": student}
        self.engines: dict[str, Engine] = {
            "teacher": build(teacher, world, seed=0, optimizer="adamw", ema=0.6),
            "student": build(other, world, seed=5, optimizer=student, ema=0.99),
        }

    def losses(self, batch: Batch, *, step: int) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        if self._kill and step == self._end:
            os.kill(os.getpid(), signal.SIGKILL)
        if not self._kill and step == self._end - 1 and self._rank == 0:
            peers.request_stop()
        image_BCHW, label_B = batch.views["global"].image_BCHW, batch.targets["class"]
        target = self.engines["teacher"].forward(image_BCHW)["logits"]
        found = self.engines["student"].forward(image_BCHW)["logits"]
        losses = {
            "teacher": {"labels": nn.functional.cross_entropy(target, label_B)},
            "student": {"logits": nn.functional.mse_loss(found, target.detach())},
        }
        if (step, self._rank) == (self._poison["step"], self._poison.get("rank")):
            spoilt = losses[self._poison["network"]]
            spoilt |= {name: loss * float(self._poison["factor"]) for name, loss in spoilt.items()}
        yield from losses.items()

    def learning_rate(self, name: str, *, step: int) -> float:
        return LEARNING_RATE[self._optimizer[name]] * (1 - step / (2 * LAST))


def batches(world: World, *, steps: list[int]) -> Iterator[Batch]:
    """This rank's micro-batches of these steps: images and labels are functions of the sample's number."""
    for step in steps:
        for index_B in rank_slice(ORDER.batch(step), rank=world.rank, world_size=world.size, micro_batch_size=MICRO):
            drawn = [np.random.default_rng(int(index)) for index in index_B]
            image_BCHW = np.stack([draws.standard_normal((3, 8, 8), np.float32) for draws in drawn])
            label_B = torch.tensor([int(draws.integers(5)) for draws in drawn])
            views = {"global": View(torch.from_numpy(image_BCHW))}
            yield Batch(views, {"class": label_B}, torch.from_numpy(index_B.copy()), label_B)


def live(world: World, *, folder: Path, segment: Mapping[str, Any], student: str, trains: bool) -> None:
    """What one rank does in a segment."""
    os.environ |= {"RANK": str(world.rank), "LOCAL_RANK": str(world.rank), "WORLD_SIZE": str(world.size)}
    world = peers.join()  # alone, the fork has no process group yet
    task = Distilling(segment, world, student=student)
    checkpoints = Checkpoints(folder / "checkpoints", world=world, keep=2)
    parts: dict[str, Any] = {name: engine.state for name, engine in task.engines.items()}
    parts["random"] = RandomState(world)
    if not trains:
        checkpoints.save(checkpoints.load_newest(parts), parts)
        checkpoints.finish()
        return
    if world.rank == 0 and segment.get("skipped"):
        write_skipped(folder / SKIPPED, dict.fromkeys(segment["skipped"], "passed over from the start"))
    attempt = partial(_train, task, checkpoints, parts, folder=folder, world=world)
    with suppress(StopRequested):
        train_past_divergence(
            attempt, checkpoints=checkpoints, parts=parts, skipped=folder / SKIPPED, limit=1, world=world
        )
    world.barrier()


def _train(
    task: Distilling,
    checkpoints: Checkpoints,
    parts: Mapping[str, Any],
    start: int,
    skipped: frozenset[int],
    *,
    folder: Path,
    world: World,
) -> None:
    """One attempt from step `start` on, without the steps `skipped`."""
    sample_log = SampleLog(
        folder / "sample_log", attempt=checkpoints.attempt, world=world, micro_batch_size=MICRO, start_step=start
    )
    micro_batches = BATCH // MICRO // world.size
    plan = Plan(LAST, micro_batches, LAST, SAVED_EVERY, None, None, skipped=skipped)
    steps = plan.steps_from(start)
    train(
        task,
        sample_log.record(batches(world, steps=steps), steps=steps, micro_batches=micro_batches),
        plan=plan,
        start_step=start,
        checkpoints=checkpoints,
        parts={**parts, "sample_log": sample_log},
        meter=Meter(world=world, images_per_step=BATCH),
        guard=NormGuard(spike=SPIKE),
        evaluate=lambda _: None,
        draw_panels=lambda *_: None,
        world=world,
    )


def state(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor and count in the newest checkpoint of a run, by engine and name."""
    store = CheckpointStore(str(folder / "checkpoints"))
    tensors = {}
    for name in NAMES:
        reader = StateReader(Path(store.place(store.committed()[-1], name)))
        tensors |= {f"{name}/{key}": reader.read(key) for key in sorted(reader._part_with)}
        tensors |= {f"{name}/{key}": torch.tensor(number) for key, number in reader.counts.items()}
    return tensors


def differences(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """The largest absolute difference in each kind of tensor, `teacher/exp_avg` and the like."""
    assert one.keys() == other.keys(), sorted(one.keys() ^ other.keys())
    found: dict[str, float] = {}
    for name, tensor in one.items():
        kind = "/".join(name.split("/")[:2])
        off = float((tensor.double() - other[name].double()).abs().max())
        found[kind] = max(found.get(kind, 0.0), off)
    return found


class Trials:
    """Runs trials in a folder, and each unbroken run once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._unbroken: dict[str, Path] = {}

    def _segment(self, folder: Path, segment: Mapping[str, Any], *, student: str, trains: bool = True) -> None:
        meeting = self._folder / "meeting"
        meeting.unlink(missing_ok=True)
        work = partial(live, folder=folder, segment=segment, student=student, trains=trains)
        ended = wait_for(fork_ranks(segment["size"], meeting, work), patience_s=300.0)
        killed = segment.get("kill", False)
        assert all(how == "SIGKILL" for how in ended) if killed else set(ended) == {"exit 0"}, (segment, ended)

    def unbroken(self, *, size: int, engines: list[str], student: str, skipped: tuple[int, ...] = ()) -> Path:
        """The folder of a run at one world size that nothing interrupted."""
        key = f"{size}-{'-'.join(engines)}-{student}-{'-'.join(map(str, skipped))}"
        if key not in self._unbroken:
            self._unbroken[key] = self._folder / key
            whole = {"size": size, "engines": engines, "end": LAST, "skipped": skipped}
            self._segment(self._unbroken[key], whole, student=student)
        return self._unbroken[key]

    def trial(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """One trial, and how far its end is from that of the unbroken run."""
        student = given.get("student", "adamw")
        self._count += 1
        folder = self._folder / f"trial-{self._count}"
        for segment in given["segments"]:
            self._segment(folder, segment, student=student)
        found, expected = state(folder), state(self.unbroken(**given["unbroken"], student=student))
        used, passed_over = read_history(folder / "sample_log"), read_skipped(folder / SKIPPED)
        for segment in given.get("passes", []):
            self._segment(folder, segment, student=student, trains=False)
        passed = state(folder)
        shutil.rmtree(folder)
        return {
            "equal": all(torch.equal(found[name], expected[name]) for name in expected),
            "passed": all(torch.equal(found[name], passed[name]) for name in found),
            "off": differences(found, expected),
            "attempts": used.num_attempts,
            "as_ordered": not judge(used, ORDER, sorted(set(range(LAST)) - passed_over.keys())),
            "skipped": sorted(passed_over),
        }


def main() -> None:
    torch.set_num_threads(1)
    import_deepspeed(World(rank=0, size=1, local_rank=0, device=torch.device("cpu")))
    trials = Trials(Path(sys.argv[1]))
    for given in json.loads(Path(sys.argv[2]).read_text()):
        print(json.dumps(trials.trial(given)), flush=True)


if __name__ == "__main__":
    main()
