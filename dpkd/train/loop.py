"""The training loop of teachers and students: losses, optimizer steps, logs, evaluations and saves.

The position of a run is one integer, the number of finished steps. Order, augmentation, masks and learning rates are
functions of it, so a resumed run continues as if it had never stopped.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch.profiler import record_function

from dpkd.data.batch import Batch
from dpkd.engine.world import World, stop_requested
from dpkd.errors import StopRequested
from dpkd.launch.heartbeat import STEADY, heartbeat
from dpkd.train.checkpoint import Checkpoints, Part
from dpkd.train.divergence import NormGuard
from dpkd.train.meter import Meter
from dpkd.train.task import Task


@dataclass(frozen=True)
class Plan:
    """The length and the intervals of a stage, in steps; `micro_batches` is the number per rank and step."""

    total_steps: int
    micro_batches: int
    log_every: int
    checkpoint_every: int
    evaluate_every: int | None
    panels_every: int | None
    skipped: frozenset[int] = frozenset()
    """Steps that are not trained and draw no batch."""

    def steps_from(self, start_step: int) -> list[int]:
        """The steps that are trained, from `start_step` on."""
        return [step for step in range(start_step, self.total_steps) if step not in self.skipped]

    def due(self, every: int | None, step: int) -> bool:
        """Whether an action done every `every` steps, and after the last step, is due after `step`."""
        return every is not None and (step % every == 0 or step == self.total_steps)


def train(
    task: Task,
    batches: Iterator[Batch],
    *,
    plan: Plan,
    start_step: int,
    checkpoints: Checkpoints,
    parts: Mapping[str, Part],
    meter: Meter,
    guard: NormGuard,
    evaluate: Callable[[int], None],
    draw_panels: Callable[[int, Batch], None],
    world: World,
) -> None:
    """Trains from `start_step` to the end of the plan; `batches` starts at that step, and saves write the `parts`.

    `evaluate` and `draw_panels` take the number of finished steps; every rank calls them. Raises `StopRequested` after
    a save if any rank was asked to stop, `Diverged` if a step has spoilt a network, `StorageError` if a save fails.
    Norms and losses stay on the device until they are needed: all new norms are checked before each log line, panel,
    evaluation and save.
    """
    batch: Batch | None = None
    with meter.loop(start_step):
        for step in range(start_step, plan.total_steps):
            heartbeat(STEADY, step=step)
            if step not in plan.skipped:
                batch = train_step(task, batches, step=step, plan=plan, meter=meter)
            done = step + 1
            stop, unsaved = world.any_of(stop_requested(), checkpoints.failed())
            save_due = stop or unsaved or plan.due(plan.checkpoint_every, done)
            log_due = plan.due(plan.log_every, done)
            panels_due = batch is not None and plan.due(plan.panels_every, done)
            evaluate_due = plan.due(plan.evaluate_every, done)
            if save_due or log_due or panels_due or evaluate_due:
                guard.check(meter.settle(done, log=log_due))
            with meter.interrupted("evaluation"):
                if batch is not None and panels_due:
                    heartbeat("panels", step=done)
                    draw_panels(done, batch)
                if evaluate_due:
                    heartbeat("evaluate", step=done)
                    evaluate(done)
            if save_due:
                heartbeat("save", step=done)
                with meter.interrupted("checkpoint"):
                    checkpoints.save(done, parts)
            meter.end_step(done, due=save_due or log_due)
            if stop and done < plan.total_steps:
                with meter.interrupted("checkpoint"):
                    checkpoints.finish()
                raise StopRequested(f"stopped after step {done} of {plan.total_steps}, saved")
        heartbeat("save", step=plan.total_steps)
        with meter.interrupted("checkpoint"):
            checkpoints.finish()


def train_step(task: Task, batches: Iterator[Batch], *, step: int, plan: Plan, meter: Meter) -> Batch:
    """Runs one step of every engine; returns the last micro-batch. `dpkd profile` times the parts named `dpkd: …`.

    Each engine takes its step right after its last backward, so one network's gradients are in memory at a time. The
    outputs of a live teacher are of the weights before its step.
    """
    for drawn in range(1, plan.micro_batches + 1):
        batch = meter.next_batch(batches)
        for name, losses in task.losses(batch, step=step):
            with record_function(f"dpkd: backward of {name}"):
                task.engines[name].backward(torch.stack(list(losses.values())).sum())
            meter.add_losses(name, losses)
            if drawn == plan.micro_batches:
                rate = task.learning_rate(name, step=step)
                with record_function(f"dpkd: optimizer of {name}"):
                    norm = task.engines[name].step(learning_rate=rate)
                meter.add_norm(name, norm, step=step, learning_rate=rate)
    return batch
