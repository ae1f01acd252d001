"""`dpkd profile`: some steps of a training stage under torch's profiler, a trace, and a table of where a step goes."""

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch.profiler import profile as torch_profile
from torch.profiler import record_function

from dpkd.data.order import rank_micro_batches
from dpkd.data.stream import load_batches
from dpkd.engine.world import join
from dpkd.errors import UserError, did_you_mean
from dpkd.log import logger
from dpkd.run.folder import RunFolder
from dpkd.settings import Settings
from dpkd.stages.plan import training_stages, with_origin
from dpkd.stages.run import Run
from dpkd.stages.training import distill_task, sample_order, teach_task
from dpkd.train.loop import Plan, train_step
from dpkd.train.meter import Meter

PREFIX, STEP = "dpkd: ", "the rest of a step"
WARM_UP = 3
"""Steps before those that count: they start the loader, choose kernels and allocate."""


def profile(settings: Settings, stage: str | None, *, steps: int) -> None:
    """Profiles the first steps of a training stage in this process, on one device; saves nothing but the trace.

    By default the stage is the first of the run. A step has its whole batch, in the micro-batches of the settings.
    Raises `UserError` for an unknown stage, and if an earlier stage has not run.
    """
    stages = {name: trained for name, trained in training_stages(settings).items() if trained.kind != "baselines"}
    stage = stage or next(iter(stages))
    if stage not in stages:
        raise UserError(f"--stage {stage!r}: no such stage{did_you_mean(stage, stages)} (they are {', '.join(stages)})")
    if settings.launcher.threads is not None:
        torch.set_num_threads(settings.launcher.threads)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports its own start on the screen
    settings = with_origin(settings, RunFolder(settings.run.dir))
    run = Run.open(settings, world := join())
    task, data, owner = distill_task(run) if stage == "distill" else teach_task(run, stages[stage].name)
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
        targets=data.targets,
        maps=run.maps_of(data.split.name, task.maps | owner.augment.maps),
        views=run.view_plans(task.views, owner.augment),
        seed=run.seed,
        loader=run.data.loader,
    )
    meter = Meter(world=world, images_per_step=training.batch_size, report=lambda *_, **__: None)

    def run_steps(numbers: range) -> None:
        for step in numbers:
            with record_function(PREFIX + STEP):
                train_step(task, batches, step=step, plan=plan, meter=meter)
                if plan.due(plan.log_every, step + 1):
                    with record_function("dpkd: logging"):
                        meter.settle(step + 1, log=True)
        if world.device.type == "cuda":
            torch.cuda.synchronize()

    run_steps(range(WARM_UP))
    with torch_profile() as profiler:  # of the CPU, and of a GPU if there is one
        run_steps(range(WARM_UP, plan.total_steps))
    batches.close()
    trace = run.folder.path / "profile" / f"{stage}.json.gz"
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))
    found = parts(profiler.events() or [])
    total_us = sum(host_us for host_us, _ in found.values())
    logger.info(f"{stage}: {total_us / steps / 1e3:.1f} ms a step, mean of {steps} steps after {WARM_UP}")
    for name, (host_us, device_us) in sorted(found.items(), key=lambda item: -item[1][0]):
        line = f"  {name:<40}{host_us / steps / 1e3:10.2f} ms{100 * host_us / total_us:7.1f} %"
        logger.info(line + (f"{device_us / steps / 1e3:10.2f} ms of kernels" if device_us else ""))
    logger.info(f"trace: {trace} (chrome://tracing or https://ui.perfetto.dev)")
    world.leave()


def parts(events: Iterable[Any]) -> dict[str, tuple[float, float]]:
    """Microseconds of each part of the steps on the host, without the parts inside it, and of its kernels on a GPU.

    A kernel belongs to the part in which it was launched, also by another thread, such as those of the backward.
    """
    on_host = [event for event in events if event.device_type.name == "CPU"]
    found: dict[str, tuple[float, float]] = {}
    open_parts: list[tuple[float, str]] = []

    def add(name: str, host_us: float, device_us: float) -> None:
        before = found.get(name, (0.0, 0.0))
        found[name] = before[0] + host_us, before[1] + device_us

    for event in sorted(on_host, key=lambda event: (event.time_range.start, -event.time_range.end)):
        start, end = event.time_range.start, event.time_range.end
        while open_parts and open_parts[-1][0] <= start:
            open_parts.pop()
        if event.name.startswith(PREFIX):
            if open_parts:
                add(open_parts[-1][1], start - end, 0.0)
            open_parts.append((end, event.name.removeprefix(PREFIX)))
            add(open_parts[-1][1], end - start, 0.0)
        elif open_parts:
            add(open_parts[-1][1], 0.0, event.self_device_time_total)
    return found
