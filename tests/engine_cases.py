"""Trains a small network with every engine in this process, one rank of one or two, and keeps what happened.

`main` writes `FOLDER/<world size>-<rank>.pt` and the engines' states beside it.
The global batch is 8 images in micro-batches of 2, whatever the world size, so all engines must see the same losses.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from dpkd.backends.deepspeed_engine import DeepSpeedEngine
from dpkd.engine.protocol import Engine
from dpkd.engine.settings import EngineSettings, OptimizerSettings
from dpkd.engine.torch_engine import TorchEngine
from dpkd.engine.world import World, join
from dpkd.errors import UserError

STAGE: dict[str, Literal[0, 1, 2, 3] | None] = {"torch": None, "zero0": 0, "zero1": 1, "zero2": 2, "zero3": 3}
PAIRS = (("zero3", "zero1"), ("zero3", "zero3"), ("zero2", "zero0"))
NUM_MICROS, MICRO = 4, 2
STEPS, SAVED_AT = 6, 3
ADAMW = OptimizerSettings(clip=0.5, weight_decay=0.1)
SGD = OptimizerSettings(kind="sgd", clip=None, weight_decay=0.1, momentum=0.9)
EMA = 0.6


class Net(nn.Module):
    """A frozen stem, batch norm, a layer wide enough to be sharded at ZeRO-3, and a head that no loss reaches."""

    def __init__(self, *, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(3, 8, 3, bias=False)
        self.stem.weight.requires_grad = False
        self.norm = nn.BatchNorm2d(8)
        self.wide = nn.Linear(8 * 36, 400)
        self.head = nn.Linear(400, 5)
        self.unused = nn.Linear(400, 3)

    def forward(self, image_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
        embedding_BD = torch.tanh(self.wide(torch.relu(self.norm(self.stem(image_BCHW))).flatten(1)))
        return {"embedding": embedding_BD, "logits": self.head(embedding_BD), "unused": self.unused(embedding_BD)}


def groups(module: nn.Module) -> list[dict[str, Any]]:
    """Vectors without weight decay; the wide layer at half the rate."""
    found = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        decay, scale = (0.1 if parameter.ndim > 1 else 0.0), (0.5 if name.startswith("wide") else 1.0)
        found.append({"params": [parameter], "names": [name], "weight_decay": decay, "lr_scale": scale})
    return found


def micro_batch(step: int, position: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels of one micro-batch of a step's global batch."""
    generator = torch.Generator().manual_seed(100 * step + position)
    image_BCHW = torch.randn(MICRO, 3, 8, 8, generator=generator)
    return image_BCHW, torch.randint(0, 5, (MICRO,), generator=generator)


def rate(step: int) -> float:
    return 0.02 / (step + 1)


def build(
    kind: str,
    world: World,
    *,
    seed: int = 0,
    optimizer: OptimizerSettings = ADAMW,
    ema: float | None = EMA,
    precision: str = "fp32",
    **options: Any,
) -> Engine:
    """An engine of this kind over the small network."""
    module = Net(seed=seed)
    parts: dict[str, Any] = {
        "parameter_groups": groups(module),
        "optimizer": optimizer,
        "settings": EngineSettings(zero_stage=STAGE[kind] or 0, ema=ema),
        "world": world,
        "accumulation": NUM_MICROS // world.size,
        "micro_batch_size": MICRO,
        "precision": precision,
        **options,
    }
    return TorchEngine(module, **parts) if STAGE[kind] is None else DeepSpeedEngine(module, **parts)


@dataclass
class Trace:
    """What happened in some steps, and the weights after them."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    predictions: list[torch.Tensor] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


def train(engine: Engine, world: World, *, first: int, last: int) -> Trace:
    """Trains from step `first` up to `last`, predicting between the micro-batches as well."""
    trace = Trace()
    for step in range(first, last):
        total = torch.zeros((), device=world.device)
        for position in range(NUM_MICROS)[world.rank :: world.size]:
            image_BCHW, label_B = (tensor.to(world.device) for tensor in micro_batch(step, position))
            loss = nn.functional.cross_entropy(engine.forward(image_BCHW)["logits"], label_B)
            engine.backward(loss)
            engine.predict(image_BCHW)
            total += loss.detach()
        norm = engine.step(learning_rate=rate(step))
        assert isinstance(norm, torch.Tensor), "the caller says when to wait for the device"
        assert norm.ndim == 0
        trace.norms.append(float(norm))
        trace.losses.append(float(world.mean_(total)) * world.size / NUM_MICROS)
        trace.predictions.append(engine.predict(micro_batch(step, 0)[0].to(world.device))["logits"].cpu())
    trace.weights = engine.state.weights()
    return trace


def distil(kinds: tuple[str, str], world: World) -> Trace:
    """A teacher and a student in engines of their own: the teacher learns labels, the student the teacher's logits."""
    teacher, student = build(kinds[0], world), build(kinds[1], world, seed=5)
    trace = Trace()
    for step in range(STEPS):
        total = torch.zeros(())
        for position in range(NUM_MICROS)[world.rank :: world.size]:
            image_BCHW, label_B = micro_batch(step, position)
            target = teacher.forward(image_BCHW)["logits"]
            loss = nn.functional.mse_loss(student.forward(image_BCHW)["logits"], target.detach())
            teacher.backward(nn.functional.cross_entropy(target, label_B))
            student.backward(loss)
            total += loss.detach()
        trace.norms.append(float(teacher.step(learning_rate=rate(step))))
        trace.norms.append(float(student.step(learning_rate=rate(step))))
        trace.losses.append(float(world.mean_(total)) * world.size / NUM_MICROS)
    return trace


def refusal(engine: Engine, folder: Path) -> str:
    """What the engine says of a state it cannot load."""
    try:
        engine.state.load(folder)
    except UserError as error:
        return str(error)
    return ""


def optimizer_facts(engine: Any) -> dict[str, Any]:
    """What the torch optimizer inside an engine holds: each group's rate and decay, each tensor's count of updates."""
    optimizer = engine._optimizer
    counts = [state["step"] for state in optimizer.state.values()]
    return {
        "groups": {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups},
        "counts": {float(count) for count in counts},
        "counts are their own": len({count.data_ptr() for count in counts}) == len(counts),
    }


def run(kind: str, world: World, folder: Path) -> dict[str, Any]:
    """Everything that is asked of one kind of engine."""
    state = folder / f"state-{world.size}-{kind}"
    engine = build(kind, world)
    start = train(engine, world, first=0, last=SAVED_AT)
    engine.state.snapshot()(state)
    world.barrier()
    rest = train(engine, world, first=SAVED_AT, last=STEPS)
    found: dict[str, Any] = {"start": start, "rest": rest}
    sources = [f"{world.size}-{kind}"] + ([f"1-{other}" for other in ("torch", "zero3")] if world.size > 1 else [])
    for source in sources:
        fresh = build(kind, world, seed=1 + world.rank)
        fresh.state.load(folder / f"state-{source}")
        found[f"from {source}"] = train(fresh, world, first=SAVED_AT, last=STEPS)
        found[f"optimizer from {source}"] = optimizer_facts(fresh)
    sgd = build(kind, world, optimizer=SGD, ema=None)
    found["refused"] = refusal(sgd, state)
    found["sgd start"] = train(sgd, world, first=0, last=1)
    sgd.state.snapshot()(state / "sgd")
    world.barrier()
    found["sgd rest"] = train(sgd, world, first=1, last=SAVED_AT)
    if world.size == 1:
        resumed = build(kind, world, optimizer=SGD, ema=None, seed=3)
        resumed.state.load(state / "sgd")
        found["bf16"] = train(build(kind, world, precision="bf16"), world, first=0, last=SAVED_AT)
        found["sgd resumed"] = train(resumed, world, first=1, last=SAVED_AT)
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    world = join()
    found: dict[str, Any] = {kind: run(kind, world, folder) for kind in STAGE}
    for pair in PAIRS if world.size > 1 else (("torch", "torch"),):
        found["+".join(pair)] = distil(pair, world)
    torch.save(found, folder / f"{world.size}-{world.rank}.pt")
    world.leave()
