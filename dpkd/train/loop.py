"""The one training loop, for the teacher and for students: a task's losses, its engines' steps, and what is due when.

The position of a run is one integer, the number of finished steps: order, augmentation, masks and learning rates are
functions of it, so a resumed run goes on as if it had never stopped.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from dpkd.data.stream import Batch
from dpkd.engine.protocol import Engine
from dpkd.engine.world import World, stop_requested
from dpkd.errors import StopRequested
from dpkd.launch.heartbeat import STEADY, heartbeat
from dpkd.train.checkpoint import Checkpoints, Part
from dpkd.train.divergence import NormGuard
from dpkd.train.meter import Meter

Losses = dict[str, dict[str, torch.Tensor]]
"""Engine -> objective -> weighted scalar."""


class Task(Protocol):
    """What is trained: engines by name, and what each minimises on a batch."""

    @property
    def engines(self) -> Mapping[str, Engine]:
        """The networks that are trained, by name."""

    def losses(self, batch: Batch, *, step: int) -> Losses:
        """The weighted losses of one micro-batch, each a mean over it."""

    def learning_rate(self, name: str, *, step: int) -> float:
        """Learning rate of an engine at a step."""


@dataclass(frozen=True)
class Plan:
    """How long a stage is and what is due when, in steps; `micro_batches` is a rank's share of one step."""

    total_steps: int
    micro_batches: int
    log_every: int
    checkpoint_every: int
    evaluate_every: int | None
    panels_every: int | None
    skipped: frozenset[int] = frozenset()
    """Steps that are passed over, without a batch."""

    def steps_from(self, start_step: int) -> list[int]:
        """The steps that are trained, from `start_step` on."""
        return [step for step in range(start_step, self.total_steps) if step not in self.skipped]

    def due(self, every: int | None, step: int) -> bool:
        """Whether something done `every` so many steps, and at the last, is due after `step`."""
        return every is not None and (step % every == 0 or step == self.total_steps)


@dataclass(frozen=True)
class Hooks:
    """What the loop calls beside training; every rank calls both."""

    evaluate: Callable[[int], None]
    panels: Callable[[int, Batch], None]


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
    hooks: Hooks,
    world: World,
) -> None:
    """Trains from `start_step` to the end of the plan; `batches` begins at that step, `parts` are what is saved.

    Raises `StopRequested` after a save when any rank was asked to stop, `Diverged` when a step has spoilt a network,
    `UserError` when a checkpoint cannot be written.
    """
    batch: Batch | None = None
    with meter.timer.loop(start_step):
        for step in range(start_step, plan.total_steps):
            heartbeat(STEADY, step=step)
            if step not in plan.skipped:
                batch = _train_step(task, batches, step=step, plan=plan, meter=meter, guard=guard)
            done = step + 1
            if plan.due(plan.log_every, done):
                meter.write(done)
            stop, unsaved = world.any_of(stop_requested(), checkpoints.failed())
            save_due = stop or unsaved or plan.due(plan.checkpoint_every, done)
            _look(done, batch, plan=plan, hooks=hooks, meter=meter)
            if save_due:
                heartbeat("save", step=done)
                with meter.timer.interrupted("checkpoint"):
                    checkpoints.save(done, parts)
            meter.timer.after_step(done, due=save_due or plan.due(plan.log_every, done))
            if stop and done < plan.total_steps:
                with meter.timer.interrupted("checkpoint"):
                    checkpoints.finish()
                raise StopRequested(f"stopped after step {done} of {plan.total_steps}, saved")
        heartbeat("save", step=plan.total_steps)
        with meter.timer.interrupted("checkpoint"):
            checkpoints.finish()


def _look(done: int, batch: Batch | None, *, plan: Plan, hooks: Hooks, meter: Meter) -> None:
    """Panels and evaluation, where they are due after the step; every rank takes part."""
    with meter.timer.interrupted("evaluation"):
        if batch is not None and plan.due(plan.panels_every, done):
            heartbeat("panels", step=done)
            hooks.panels(done, batch)
        if plan.due(plan.evaluate_every, done):
            heartbeat("evaluate", step=done)
            hooks.evaluate(done)


def _train_step(
    task: Task, batches: Iterator[Batch], *, step: int, plan: Plan, meter: Meter, guard: NormGuard
) -> Batch:
    """One step of every engine; returns its last micro-batch."""
    for _ in range(plan.micro_batches):
        batch = meter.wait_for(batches)
        losses = task.losses(batch, step=step)
        for name, engine in task.engines.items():
            engine.backward(torch.stack(list(losses[name].values())).sum())
        meter.add_losses(losses)
    rates = {name: task.learning_rate(name, step=step) for name in task.engines}
    # every engine first: one that holds gradients when a step is undone would add them to the next
    norms = {name: float(engine.step(learning_rate=rates[name])) for name, engine in task.engines.items()}
    for name, norm in norms.items():
        guard.check(name, norm, step=step, learning_rate=rates[name])
        meter.add_step(name, learning_rate=rates[name], gradient_norm=norm)
    return batch
