"""`dpkd profile`: some steps of a training stage under torch's profiler, a trace, and a table of where a step goes."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from dpkd.data.order import rank_micro_batches
from dpkd.data.stream import load_batches
from dpkd.engine.world import join
from dpkd.errors import UserError, did_you_mean
from dpkd.log import logger
from dpkd.settings import Settings
from dpkd.stages.plan import stages_of, teaching_stages
from dpkd.stages.run import Run
from dpkd.stages.training import distill_task, sample_order, teach_task
from dpkd.train.loop import Plan, train_step
from dpkd.train.meter import Meter

PREFIX, STEP = "dpkd: ", "the rest of a step"
WARM_UP = 3
"""Steps before those that count: they start the loader, choose kernels and allocate."""


def profile_stage(settings: Settings, stage: str | None, *, steps: int) -> None:
    """Profiles the first steps of a training stage in this process, on one device; saves nothing but the trace.

    By default the stage is the first of the run. A step has its whole batch, in the micro-batches of the settings.
    Raises `UserError` for an unknown stage, and if an earlier stage has not run.
    """
    teachers = teaching_stages(settings)
    names = [name for name in stages_of(settings) if name in {*teachers, "distill"}]
    stage = stage or names[0]
    if stage not in names:
        raise UserError(f"--stage {stage!r}: no such stage{did_you_mean(stage, names)} (they are {', '.join(names)})")
    if settings.launcher.threads is not None:
        torch.set_num_threads(settings.launcher.threads)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports its own start on the screen
    world = join()
    run = Run.open(settings, world)
    task, data, owner = distill_task(run) if stage == "distill" else teach_task(run, teachers[stage])
    training = owner.training
    plan = Plan(WARM_UP + steps, run.micro_batches(training), training.log_every, WARM_UP + steps + 1, None, None)
    batches = load_batches(
        data.split,
        rank_micro_batches(
            sample_order(run, training, data),
            range(plan.total_steps),
            rank=0,
            world_size=1,
            micro_batch_size=run.micro_batch_size(training),
        ),
        targets={"class": data.label_N},
        maps=run.maps_of(data.split.name, task.maps),
        views=run.view_plans(task.views, owner.augment),
        seed=run.seed,
        loader=run.data.loader,
    )
    meter = Meter(world=world, images_per_step=training.batch_size, report=lambda *_, **__: None)
    on_gpu = world.device.type == "cuda"
    profiler = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])])
    for step in range(plan.total_steps):
        if step == WARM_UP:
            profiler.start()
        with record_function(PREFIX + STEP):
            train_step(task, batches, step=step, plan=plan, meter=meter)
            if plan.due(plan.log_every, step + 1):
                with record_function("dpkd: logging"):
                    meter.settle(step + 1, log=True)
    if on_gpu:
        torch.cuda.synchronize()
    profiler.stop()
    batches.close()
    trace = run.folder.path / "profile" / f"{stage}.json.gz"
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))
    for line in table(parts(profiler.events() or []), num_steps=steps, stage=stage, on_gpu=on_gpu):
        logger.info(line)
    logger.info(f"trace: {trace} (chrome://tracing or https://ui.perfetto.dev)")
    world.leave()


@dataclass
class Part:
    """Time of one part of the steps, in microseconds, without the parts inside it."""

    host_us: float = 0.0
    device_us: float = 0.0
    """Time of the kernels that were launched in this part, also by the threads of the backward."""


def parts(events: Iterable[Any]) -> dict[str, Part]:
    """The parts of the steps by name, in the order in which they began."""
    on_host = sorted(
        (event for event in events if event.device_type.name == "CPU"),
        key=lambda event: (event.time_range.start, -event.time_range.end),
    )
    found: dict[str, Part] = {}
    open_parts: list[tuple[float, Part]] = []
    for event in on_host:
        start, end = event.time_range.start, event.time_range.end
        while open_parts and open_parts[-1][0] <= start:
            open_parts.pop()
        if event.name.startswith(PREFIX):
            part = found.setdefault(event.name.removeprefix(PREFIX), Part())
            part.host_us += end - start
            if open_parts:
                open_parts[-1][1].host_us -= end - start
            open_parts.append((end, part))
        elif open_parts:
            open_parts[-1][1].device_us += event.self_device_time_total
    return found


def table(found: dict[str, Part], *, num_steps: int, stage: str, on_gpu: bool) -> list[str]:
    """The parts as lines: milliseconds a step, and the share of the step."""
    total_us = sum(part.host_us for part in found.values())
    lines = [f"{stage}: {total_us / num_steps / 1e3:.1f} ms a step, mean of {num_steps} steps after {WARM_UP}"]
    for name, part in sorted(found.items(), key=lambda item: -item[1].host_us):
        share, device = 100 * part.host_us / total_us, f"{part.device_us / num_steps / 1e3:10.2f} ms of kernels"
        line = f"  {name:<40}{part.host_us / num_steps / 1e3:10.2f} ms{share:7.1f} %"
        lines.append(line + (device if on_gpu else ""))
    return lines
