"""What the training stages share: networks with their engines, and the way into the loop."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from dpkd.data.attributes import score_weights
from dpkd.data.order import ClassAwareOrder, Order, OrderWithout, SampleOrder
from dpkd.data.settings import AugmentSettings
from dpkd.data.stream import Batch, training_batches
from dpkd.engine.batch_norm import StepStatistics
from dpkd.engine.settings import EngineSettings, OptimizerSettings, ScheduleSettings, TrainingSettings
from dpkd.errors import UserError
from dpkd.log import Progress, logger
from dpkd.models.network import Network, build_network
from dpkd.models.parameters import parameter_groups
from dpkd.models.settings import ModelSettings, NetworkSpec
from dpkd.objectives.settings import (
    VIEW_MAPS,
    FeatureDistillation,
    MaskedPrior,
    PatchDistillation,
    RegionBounds,
    StudentObjective,
)
from dpkd.report.goodput import StepTimer
from dpkd.report.quarantine import Quarantine
from dpkd.report.tensorboard import Board
from dpkd.stages.monitor import EventSink, ProgressSink, Watch, step_timer
from dpkd.stages.run import Run, TrainingSet
from dpkd.stages.statements import attribute_table, learns_attributes
from dpkd.train.checkpoint import Checkpoints, Part
from dpkd.train.divergence import NormGuard, Skipped, train_past_divergence
from dpkd.train.loop import Plan, train
from dpkd.train.meter import Meter
from dpkd.train.parts import Inputs, RandomState
from dpkd.train.sample_log import SampleLog, truncate
from dpkd.train.statements import ClassAttributes, Statements
from dpkd.train.task import DistillTask, Learner, Supervision, TeachTask


def network_spec(
    run: Run,
    data: TrainingSet,
    model: ModelSettings,
    objectives: Sequence[StudentObjective],
    *,
    teacher: Network | None = None,
) -> NetworkSpec:
    """The spec of a network whose heads are those that its objectives need."""
    targets = {name for objective in objectives if isinstance(objective, MaskedPrior) for name in objective.targets}
    follows = any(isinstance(objective, FeatureDistillation | PatchDistillation) for objective in objectives)
    channels = VIEW_MAPS | (run.priors.channels if run.priors is not None else {})
    manifest = run.dataset.manifest
    table = attribute_table(run.data) if learns_attributes(objectives) else None
    return NetworkSpec(
        model=model,
        classes=data.class_names,
        image_size=run.data.image_size,
        mean=manifest.image_mean,
        std=manifest.image_std,
        targets={name: channels[name] for name in sorted(targets)},
        attributes=table.names if table is not None else (),
        regions=tuple(objective.of for objective in objectives if isinstance(objective, RegionBounds)),
        teacher_dim=teacher.embedding_dim if teacher is not None and follows else None,
        teacher_patch_dim=teacher.patch_dim if teacher is not None and follows else None,
    )


def supervision(run: Run, data: TrainingSet) -> Supervision:
    """What labels and experts say of the trained classes; raises `UserError` for a table that does not fit them."""
    device = run.world.device
    table, attributes = attribute_table(run.data), None
    if table is not None:
        if not (data.label_N >= 0).any():
            raise UserError(
                f"data.attributes describes classes, and no label is visible in the split {data.split.name!r}: show "
                "some (data.labels), or leave the objective `attributes` out"
            )
        value_KA = table.rows(data.class_names)
        arrays = (value_KA, *score_weights(value_KA))
        attributes = ClassAttributes(*(torch.from_numpy(array).to(device) for array in arrays))
    return replace(data.supervision(device), statements=Statements(data.class_names, attributes))


class LearningSettings(Protocol):
    """What the teacher's and a student's settings have in common."""

    @property
    def optimizer(self) -> OptimizerSettings:
        """How weights are updated."""

    @property
    def schedule(self) -> ScheduleSettings:
        """How the learning rate goes."""

    @property
    def engine(self) -> EngineSettings:
        """What runs the network."""


def make_learner(
    run: Run,
    network: Network,
    *,
    settings: LearningSettings,
    objectives: Sequence[StudentObjective],
    training: TrainingSettings,
    total_steps: int,
) -> Learner:
    """Puts a network into its engine; every rank calls it with the same weights."""
    micro_batch_size = run.micro_batch_size(training)
    optimizer = settings.optimizer
    groups = parameter_groups(network, weight_decay=optimizer.weight_decay, layer_decay=optimizer.layer_decay)
    engine = run.make_engine(
        network,
        settings=settings.engine,
        parameter_groups=groups,
        optimizer=optimizer,
        world=run.world,
        accumulation=training.batch_size // (micro_batch_size * run.world.size),
        micro_batch_size=micro_batch_size,
        precision=run.precision(training),
        statistics=StepStatistics(network),
    )
    return Learner(
        engine=engine,
        network=network,
        objectives=objectives,
        optimizer=optimizer,
        schedule=settings.schedule,
        total_steps=total_steps,
    )


def new_network(run: Run, spec: NetworkSpec, *, place: int) -> Network:
    """A network with first weights that depend on the run's seed and its place among the networks alone."""
    return build_network(spec, seed=run.seed * 1000 + place)


def run_training(
    run: Run,
    task: TeachTask | DistillTask,
    data: TrainingSet,
    *,
    stage: str,
    training: TrainingSettings,
    augment: AugmentSettings,
) -> None:
    """Trains a task from its newest whole checkpoint to its end."""
    checkpoints = Checkpoints(run.folder.checkpoints(stage), world=run.world, keep=training.keep_checkpoints)
    # dropout must not depend on what this process did before; a checkpoint brings the state of its step
    torch.manual_seed(run.seed * 100_003 + run.world.rank)
    skipped = Skipped(run.folder.skipped(stage), limit=training.max_skipped_steps, world=run.world)
    parts = _checkpoint_parts(run, task, data)
    stage_of = _Stage(run, task, data, stage, training, augment)

    def attempt(start_step: int, skipped_steps: frozenset[int]) -> None:
        stage_of.train(checkpoints, parts, start_step=start_step, skipped=skipped_steps)

    train_past_divergence(attempt, checkpoints=checkpoints, parts=parts, skipped=skipped, world=run.world)


@dataclass(frozen=True)
class _Stage:
    """What does not change over the attempts at a stage."""

    run: Run
    task: TeachTask | DistillTask
    data: TrainingSet
    stage: str
    training: TrainingSettings
    augment: AugmentSettings

    def train(
        self, checkpoints: Checkpoints, parts: Mapping[str, Part], *, start_step: int, skipped: frozenset[int]
    ) -> None:
        """One attempt, from `start_step` to the end."""
        run, training = self.run, self.training
        plan = _plan(run, training, total_steps=training.num_steps(self.data.num_samples), skipped=skipped)
        shown = run.world.rank == 0
        if start_step and shown:
            logger.info(f"{self.stage}: continues after step {start_step} of {plan.total_steps}")
        board = Board(run.folder.tensorboard / self.stage, start_step=start_step) if shown else None
        if board is not None:
            board.quarantine(start_step, Quarantine(run.folder.quarantine, limit=1.0))
        if shown:
            run.folder.check_fence()  # the logs of a newer attempt stay
            truncate(run.folder.sample_log(self.stage), from_attempt=checkpoints.attempt)
        sample_log = SampleLog(
            run.folder.sample_log(self.stage),
            attempt=checkpoints.attempt,
            world=run.world,
            micro_batch_size=run.micro_batch_size(training),
            start_step=start_step,
        )
        with (
            closing(board) if board is not None else nullcontext(),
            Progress(self.stage, plan.total_steps, unit="steps", start=start_step, shown=shown) as progress,
            closing(self._batches(start_step, plan)) as batches,
        ):
            sinks = (board, EventSink(run, stage=self.stage), ProgressSink(progress)) if board is not None else ()
            train(
                self.task,
                sample_log.record(batches, steps=plan.steps_from(start_step), micro_batches=plan.micro_batches),
                plan=plan,
                start_step=start_step,
                checkpoints=checkpoints,
                parts={**parts, "sample_log": sample_log},
                meter=Meter(
                    sinks=sinks,
                    world=run.world,
                    images_per_step=training.batch_size,
                    timer=step_timer(run, board, stage=self.stage) if board is not None else StepTimer(),
                ),
                guard=NormGuard(spike=training.spike),
                hooks=Watch(run, self.task, board).hooks(),
                world=run.world,
            )

    def _batches(self, start_step: int, plan: Plan) -> Generator[Batch, None, None]:
        run, data = self.run, self.data
        return training_batches(
            data.split,
            order=sample_order(run, self.training, data),
            label_N=data.label_N,
            maps=run.maps_of(data.split.name, self.task.maps),
            augment=self.augment,
            seed=run.seed,
            image_size=run.data.image_size,
            map_size=run.map_size,
            rank=run.world.rank,
            world_size=run.world.size,
            micro_batch_size=run.micro_batch_size(self.training),
            start_step=start_step,
            stop_step=plan.total_steps,
            skipped=plan.skipped,
            loader=run.data.loader,
        )


def _checkpoint_parts(run: Run, task: TeachTask | DistillTask, data: TrainingSet) -> dict[str, Part]:
    """Everything that one checkpoint covers: engines, random state, what it began with."""
    maps = run.maps_of(data.split.name, task.maps)
    digests = {f"map {name!r}": digest for name, digest in maps.digests.items()} if maps is not None else {}
    inputs = Inputs(
        {"packed images": run.dataset.manifest.fingerprint, **digests}, tuple(data.unreadable.tolist()), run.world
    )
    return {**task.engines, "random": RandomState(run.world), "inputs": inputs}


def sample_order(run: Run, training: TrainingSettings, data: TrainingSet) -> SampleOrder:
    """Which samples make which batch; those that cannot be read make none."""
    order: SampleOrder
    if training.sampling == "class_aware":
        drawn_label_N = np.delete(data.label_N, data.unreadable)
        order = ClassAwareOrder(drawn_label_N, seed=run.seed, global_batch_size=training.batch_size)
    else:
        order = Order(
            data.shard_sizes,
            seed=run.seed,
            global_batch_size=training.batch_size,
            block_shards=run.data.loader.block_shards,
        )
    return OrderWithout(order, data.unreadable) if len(data.unreadable) else order


def _plan(run: Run, training: TrainingSettings, *, total_steps: int, skipped: frozenset[int]) -> Plan:
    return Plan(
        total_steps=total_steps,
        micro_batches=training.batch_size // (run.micro_batch_size(training) * run.world.size),
        log_every=training.log_every,
        checkpoint_every=training.checkpoint_every,
        evaluate_every=training.evaluate_every or max(1, total_steps // 10),
        panels_every=training.panels_every or max(1, total_steps // 5),
        skipped=skipped,
    )
