"""Measures a training step of dpkd beside what it could cost: CPU time in turns within one process, median of ratios.

    python -m tools.bench_step overhead --models resnet50,densenet201,vit_small_patch16_224 --json
    python -m tools.bench_step zero --stages 0,1           over plain DeepSpeed with the same configuration
    python -m tools.bench_step students --counts 1,2,4,8   N students in one run over N runs; peak memory
    python -m tools.bench_step commit                      the statistics of batch norms alone
    python -m tools.bench_step bf16                        bf16 over fp32
    python -m tools.bench_step hog                         hog maps of a batch
    python -m tools.bench_step lightly --counts 1,2,4    distillation beside lightly-train's LDLD (which it needs)

Every step has its batch in memory: bytes for dpkd and the bare loop, normalised floats for lightly-train. The steps of
the bare loop run between those of dpkd's own `train`, with a log line every 10 steps in both. lightly-train's method is
driven without its trainer, as one student a run; dpkd does the same work: embedding and patches, no prior maps.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import accumulate, count, pairwise, repeat
from statistics import median
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.profiler import profile

from dpkd.backends.deepspeed_engine import import_deepspeed
from dpkd.backends.engines import make_engine, make_frozen
from dpkd.data.augment import normalise
from dpkd.data.batch import Batch, View
from dpkd.engine.batch_norm import StepStatistics
from dpkd.engine.optimizer import build_optimizer
from dpkd.engine.settings import EngineSettings, OptimizerSettings
from dpkd.engine.world import World, join
from dpkd.models.network import Network, build_network
from dpkd.models.parameters import parameter_groups
from dpkd.models.settings import HeadSpec, ModelSettings, NetworkSpec
from dpkd.objectives.base import Objective, Supervision
from dpkd.objectives.features import FeatureDistillation
from dpkd.objectives.hog import hog
from dpkd.objectives.logits import LogitDistillation
from dpkd.objectives.patches import PatchDistillation
from dpkd.objectives.supervised import Supervised
from dpkd.train.checkpoint import Checkpoints
from dpkd.train.divergence import NormGuard
from dpkd.train.loop import Plan, train, train_step
from dpkd.train.meter import Meter
from dpkd.train.task import Learner, Task

NUM_CLASSES, LOG_EVERY = 100, 10
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPTIMIZER = OptimizerSettings()
STUDENTS = ("resnet18", "mobilenetv3_large_100", "resnet34", "vit_tiny_patch16_224")
"""The students of a run with several; they repeat."""

Step = Callable[[], object]


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Runs one kind of measurement, prints a line for each case, and returns what was measured."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    world, results = join(), []
    for result in CASES[options.case](options, world):
        results.append({"case": options.case, **result})
        rounded = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in result.items()}
        words = ", ".join(f"{key} {value}" for key, value in rounded.items())
        print(json.dumps(results[-1]) if options.json else words, flush=True)
    world.leave()
    return results


def _overhead(options: argparse.Namespace, world: World) -> Iterator[dict[str, Any]]:
    for model in options.models.split(","):
        settings = EngineSettings(kind="torch")
        network = _network(model, options)
        task = _task({"student": (network, (Supervised(),), settings)}, options, world)
        bare = {"bare": _bare_step(model, options, fused=True), "bare_default": _bare_step(model, options, fused=False)}
        yield {"model": model, **_beside(task, bare, options, world)}


def _zero(options: argparse.Namespace, world: World) -> Iterator[dict[str, Any]]:
    """Plain DeepSpeed drives the same network, loss, optimizer and configuration by its own three calls.

    The bare PyTorch step beside them says what DeepSpeed itself costs.
    """
    for stage in map(int, options.stages.split(",")):
        for model in options.models.split(","):
            settings = EngineSettings.model_validate({"kind": "deepspeed", "zero_stage": stage})
            task = _task({"student": (_network(model, options), (Supervised(),), settings)}, options, world)
            network = _network(model, options)
            optimizer = build_optimizer(parameter_groups(network, weight_decay=0.05), OPTIMIZER)
            config = {
                "train_micro_batch_size_per_gpu": options.batch,
                "gradient_clipping": OPTIMIZER.clip,
                "zero_optimization": {"stage": stage, "overlap_comm": False},
                "zero_allow_untested_optimizer": True,
            }
            engine, *_ = import_deepspeed(world).initialize(model=network, optimizer=optimizer, config=config)
            batch = _batch(options)

            def plain(engine: Any = engine, batch: Batch = batch) -> None:
                logits_BK = engine(_normalised(batch))["logits"]
                engine.backward(nn.functional.cross_entropy(logits_BK, batch.targets["class"]))
                engine.step()

            others = {"plain_deepspeed": plain, "bare": _bare_step(model, options, fused=True)}
            yield {"stage": stage, "model": model, **_beside(task, others, options, world)}


def _students(options: argparse.Namespace, world: World) -> Iterator[dict[str, Any]]:
    """One run with N students in turns with N runs of one; the teacher alone gives T for the ideal."""
    teacher = _network(options.teacher, options).eval()
    for number in map(int, options.counts.split(",")):
        names = [f"student-{place}" for place in range(number)]
        tasks = {name: _distilling([name], teacher, options, world) for name in names}
        steps = {name: _stepper(task, options, world) for name, task in tasks.items()}
        steps["together"] = _stepper(_distilling(names, teacher, options, world), options, world)
        frozen = make_frozen(teacher, settings=EngineSettings(), world=world, precision=options.precision)
        steps["teacher"] = partial(frozen.predict, _normalised(_batch(options)))
        peaks = {name: peak_bytes(step) for name, step in steps.items()}
        times = in_turns(steps, rounds=options.steps)
        pairs, ideals = [], []
        for turn in zip(*times.values(), strict=True):
            taken = dict(zip(times, turn, strict=True))
            alone = sum(taken[name] for name in names)
            pairs.append(alone / taken["together"])
            ideals.append(alone / (alone - (number - 1) * taken["teacher"]))
        from_ideal = median(pair / ideal - 1 for pair, ideal in zip(pairs, ideals, strict=True))
        yield {
            "students": number,
            "runs_over_one": median(pairs),
            "ideal": median(ideals),
            "from_ideal_percent": 100 * from_ideal,
            "peak_MiB": peaks["together"] / 2**20,
            "largest_alone_MiB": max(peaks[name] for name in names) / 2**20,
            "teacher_ms": 1e3 * median(times["teacher"]),
        }


def _lightly(options: argparse.Namespace, world: World) -> Iterator[dict[str, Any]]:
    """N students of dpkd in one run in turns with as many runs of lightly-train, with the same networks."""
    objectives = (FeatureDistillation(), PatchDistillation(saliency=0, edge=0))
    for number in map(int, options.counts.split(",")):
        models = {f"student-{place}": STUDENTS[place % len(STUDENTS)] for place in range(number)}
        teacher = _network(options.teacher, options)
        heads = {
            "to_teacher/embedding": HeadSpec(reads="embedding", width=teacher.backbone.embedding_dim),
            "to_teacher/patch": HeadSpec(reads="patch", width=teacher.backbone.patch_dim),
        }
        ours: dict[str, tuple[Network, tuple[Objective, ...], EngineSettings]] = {
            name: (_network(model, options, heads=heads), objectives, EngineSettings(kind="torch"))
            for name, model in models.items()
        }
        steps = {name: _lightly_step(model, options) for name, model in models.items()}
        steps["together"] = _stepper(_task(ours, options, world, teacher=teacher), options, world)
        times = in_turns(steps, rounds=options.steps)
        theirs = [sum(turn) for turn in zip(*(times[name] for name in models), strict=True)]
        yield {
            "students": number,
            "precision": options.precision,
            "lightly_over_dpkd": ratio(times | {"lightly": theirs}, "lightly", "together"),
            "lightly_ms": 1e3 * median(theirs),
            "dpkd_ms": 1e3 * median(times["together"]),
        }


def _lightly_step(name: str, options: argparse.Namespace) -> Step:
    """A step of lightly-train's distillation v3 as its trainer drives it: autocast, its optimizer, clipping at 1."""
    from lightly_train._methods.distillationv3 import distillationv3 as method  # noqa: PLC0415
    from lightly_train._models import package_helpers  # noqa: PLC0415
    from lightly_train._models.embedding_model import EmbeddingModel  # noqa: PLC0415
    from lightly_train._optim import optimizer_helpers  # noqa: PLC0415

    optimizer_settings = method.DistillationV3AdamWArgs(weight_decay=0.04)
    task: Any = method.DistillationV3(
        method_args=method.DistillationV3Args(teacher=_timm(options.teacher, options), queue_size=1024),
        optimizer_args=optimizer_settings,
        embedding_model=EmbeddingModel(package_helpers.get_wrapped_model(_timm(name, options), num_input_channels=3)),
        global_batch_size=options.batch,
        num_input_channels=3,
    )
    task.train()
    task.teacher_embedding_model.eval()
    modules = task.trainable_modules()
    optimizer = optimizer_helpers.get_optimizer(optimizer_settings, modules, 1.0)
    parameters = [parameter for module in modules.modules for parameter in module.parameters()]
    batch = {"views": [_normalised(_batch(options))]}

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16"):
            loss = task.training_step_impl(batch, 0).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return step


def _commit(options: argparse.Namespace, world: World) -> Iterator[dict[str, Any]]:
    for model in options.models.split(","):
        network = timm.create_model(model).train()
        statistics = StepStatistics(network)
        image_BCHW = torch.zeros(2, 3, 64, 64)
        parts: dict[str, list[float]] = {"before_ms": [], "after_ms": [], "commit_ms": []}
        for _ in range(options.steps):
            micro_batch = statistics.micro_batch()
            parts["before_ms"].append(1e3 * _cpu_s(micro_batch.__enter__))
            with torch.no_grad():
                network(image_BCHW)
            parts["after_ms"].append(1e3 * _cpu_s(partial(micro_batch.__exit__, None, None, None)))
            parts["commit_ms"].append(1e3 * _cpu_s(partial(statistics.commit, world.mean_)))
        yield {"model": model} | {name: median(times) for name, times in parts.items()}


def _bf16(options: argparse.Namespace, world: World) -> Iterator[dict[str, Any]]:
    for model in options.models.split(","):
        steps: dict[str, Step] = {}
        for precision in ("fp32", "bf16"):
            options.precision = precision
            networks = {"student": (_network(model, options), (Supervised(),), EngineSettings(kind="torch"))}
            task = _task(networks, options, world)
            steps[precision] = _stepper(task, options, world)
            frozen = make_frozen(_network(model, options), settings=EngineSettings(), world=world, precision=precision)
            steps[f"frozen {precision}"] = partial(frozen.predict, _normalised(_batch(options)))
        times = in_turns(steps, rounds=options.steps)
        yield {
            "model": model,
            "fp32_over_bf16": ratio(times, "fp32", "bf16"),
            "frozen_fp32_over_bf16": ratio(times, "frozen fp32", "frozen bf16"),
            "bf16_ms": 1e3 * median(times["bf16"]),
        }


def _hog(options: argparse.Namespace, world: World) -> Iterator[dict[str, Any]]:
    image_BCHW = _batch(options).views["global"].image_BCHW.to(world.device)
    times = in_turns({"hog": lambda: hog(image_BCHW)}, rounds=options.steps)
    yield {"images": options.batch, "size": options.size, "ms": 1e3 * median(times["hog"])}


CASES = {
    "overhead": _overhead,
    "zero": _zero,
    "students": _students,
    "lightly": _lightly,
    "commit": _commit,
    "bf16": _bf16,
    "hog": _hog,
}
"""The measurements, by the first word of the command."""


def in_turns(steps: Mapping[str, Step], *, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each step in each round; the first two rounds warm up and do not count."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 2):
        for name, step in steps.items():
            taken_s = _cpu_s(step)
            if number >= 2:
                times[name].append(taken_s)
    return times


def ratio(times: Mapping[str, list[float]], name: str, base: str) -> float:
    """Median of the ratios of two steps, round by round."""
    return median(a / b for a, b in zip(times[name], times[base], strict=True))


def peak_bytes(step: Step) -> int:
    """Most bytes that one step, after two others, allocates in torch above those at its start."""
    step(), step()
    with profile(profile_memory=True) as profiled:
        step()
    events: Any = profiled.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate(size for _, size in changes))


def _cpu_s(step: Step) -> float:
    began_s = time.process_time()
    step()
    return time.process_time() - began_s


def _beside(task: Task, bare: Mapping[str, Step], options: argparse.Namespace, world: World) -> dict[str, Any]:
    """Runs `train` with a loader that runs the other steps: a step of dpkd is the time between two of its calls."""
    batch, times = _batch(options), {name: list[float]() for name in bare}
    turns: list[tuple[float, float]] = []

    def batches() -> Iterator[Batch]:
        while True:
            began_s = time.process_time()
            for name, step in bare.items():
                times[name].append(_cpu_s(step))
            turns.append((began_s, time.process_time()))
            yield batch

    total, never = options.steps + 3, 10**9  # the first two warm up; the last one ends with a save
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(folder, world=world, keep=1)
        checkpoints.load_newest({})
        train(
            task,
            batches(),
            plan=Plan(total, 1, LOG_EVERY, never, None, None),
            start_step=0,
            checkpoints=checkpoints,
            parts={name: engine.state for name, engine in task.engines.items()},
            meter=Meter(world=world, images_per_step=options.batch, report=lambda *_, **__: None),
            guard=NormGuard(spike=1000.0),
            evaluate=lambda _: None,
            draw_panels=lambda *_: None,
            world=world,
        )
    ours = [after - before for (_, before), (after, _) in pairwise(turns)][2:]
    result: dict[str, Any] = {"dpkd_ms": 1e3 * median(ours)}
    for name, taken in times.items():
        result[f"{name}_ms"] = 1e3 * median(taken[2:-1])
        result[f"over_{name}_percent"] = 100 * (median(a / b for a, b in zip(ours, taken[2:-1], strict=True)) - 1)
    return result


def _stepper(task: Task, options: argparse.Namespace, world: World) -> Step:
    """One step of dpkd without the loop around it; reads losses and norms every 10 steps."""
    meter, numbers = Meter(world=world, images_per_step=options.batch), count()
    plan, batches = Plan(10**9, 1, LOG_EVERY, 10**9, None, None), repeat(_batch(options))

    def step() -> None:
        number = next(numbers)
        train_step(task, batches, step=number, plan=plan, meter=meter)
        if plan.due(LOG_EVERY, number + 1):
            meter.settle(number + 1, log=True)

    return step


def _bare_step(name: str, options: argparse.Namespace, *, fused: bool) -> Step:
    """What a user would write for the same step: a timm model, AdamW, clipping, the loss read every 10 steps."""
    torch.manual_seed(0)
    model = _timm(name, options).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, fused=fused)
    batch, numbers = _batch(options), count(1)
    mean_C11, std_C11 = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))

    def step() -> None:
        image_BCHW = (batch.views["global"].image_BCHW.float() / 255 - mean_C11) / std_C11
        with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16"):
            logits_BK = model(image_BCHW)
        loss = nn.functional.cross_entropy(logits_BK.float(), batch.targets["class"])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if next(numbers) % LOG_EVERY == 0:
            loss.item()

    return step


def _timm(name: str, options: argparse.Namespace) -> nn.Module:
    size = {"img_size": options.size} if name.startswith("vit") else {}
    return timm.create_model(name, num_classes=NUM_CLASSES, **size)


def _network(name: str, options: argparse.Namespace, *, heads: Mapping[str, HeadSpec] | None = None) -> Network:
    spec = NetworkSpec(
        model=ModelSettings(name=name),
        classes=tuple(f"class {k}" for k in range(NUM_CLASSES)),
        image_size=options.size,
        mean=MEAN,
        std=STD,
        heads=dict(heads or {}),
    )
    return build_network(spec, seed=0)


def _batch(options: argparse.Namespace) -> Batch:
    draw = torch.Generator().manual_seed(0)
    shape = (options.batch, 3, options.size, options.size)
    image_BCHW = torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw)
    label_B = torch.randint(0, NUM_CLASSES, (options.batch,), generator=draw)
    index_B = torch.arange(options.batch)
    return Batch({"global": View(image_BCHW)}, {"class": label_B}, index_B, torch.zeros_like(index_B))


def _task(
    networks: Mapping[str, tuple[Network, tuple[Objective, ...], EngineSettings]],
    options: argparse.Namespace,
    world: World,
    *,
    teacher: Network | None = None,
) -> Task:
    learners = {}
    for name, (network, objectives, settings) in networks.items():
        engine = make_engine(
            network,
            settings=settings,
            parameter_groups=parameter_groups(network, weight_decay=0.05),
            optimizer=OPTIMIZER,
            world=world,
            accumulation=1,
            micro_batch_size=options.batch,
            precision=options.precision,
        )
        learners[name] = Learner(engine, network, objectives, rate=lambda _: 1e-3)
    teachers = {}
    if teacher is not None:
        teachers["teacher"] = make_frozen(teacher, settings=EngineSettings(), world=world, precision=options.precision)
    supervision = Supervision(tuple(map(str, range(NUM_CLASSES))), 1.0, torch.zeros(NUM_CLASSES))
    return Task(learners, teachers=teachers, supervision=supervision, seed=0)


def _distilling(names: list[str], teacher: Network, options: argparse.Namespace, world: World) -> Task:
    """A task with these students, `student-3` with the fourth model of STUDENTS, and one frozen teacher."""
    settings, objectives = EngineSettings(kind="torch"), (Supervised(), LogitDistillation())
    models = {name: STUDENTS[int(name.split("-")[1]) % len(STUDENTS)] for name in names}
    networks = {name: (_network(model, options), objectives, settings) for name, model in models.items()}
    return _task(networks, options, world, teacher=teacher)


def _normalised(batch: Batch) -> Tensor:
    return normalise(batch.views["global"].image_BCHW, mean=MEAN, std=STD)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--models", default="resnet18,resnet50,densenet201,vit_small_patch16_224")
    parser.add_argument("--teacher", default="vit_small_patch16_224", help="the teacher of several students")
    parser.add_argument("--size", type=int, default=64, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=32, help="images in a step")
    parser.add_argument("--steps", type=int, default=15, help="steps that count")
    parser.add_argument("--stages", default="0,1", help="ZeRO stages")
    parser.add_argument("--counts", default="1,2,4,8", help="numbers of students in one run")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="a line of JSON for each case")
    return parser


if __name__ == "__main__":
    main()
