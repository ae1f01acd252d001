"""What the training stages share: networks with their engines, and the way into the loop."""

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from dpkd.data.batch import Batch
from dpkd.data.order import ClassAwareOrder, Order, OrderWithout, SampleOrder
from dpkd.data.settings import AugmentSettings
from dpkd.data.stream import training_batches
from dpkd.engine.settings import TrainingSettings
from dpkd.log import Progress, logger
from dpkd.models.network import Network, build_network
from dpkd.models.parameters import parameter_groups
from dpkd.models.saved import load_network, save_network
from dpkd.models.settings import HeadSpec, ModelSettings, NetworkSpec
from dpkd.objectives.base import VIEW_MAPS, Objective, teacher_of
from dpkd.report.goodput import StepTimer
from dpkd.report.quarantine import Quarantine
from dpkd.report.tensorboard import Board
from dpkd.settings import StudentSettings, TeacherSettings
from dpkd.stages.attributes import attribute_table
from dpkd.stages.monitor import EventSink, Monitor, ProgressSink, step_timer
from dpkd.stages.run import Run, TrainingSet
from dpkd.train.checkpoint import Checkpoints, Part
from dpkd.train.divergence import NormGuard, Skipped, train_past_divergence
from dpkd.train.loop import Hooks, Plan, train
from dpkd.train.meter import Meter
from dpkd.train.parts import Inputs, RandomState
from dpkd.train.sample_log import SampleLog, truncate
from dpkd.train.task import Learner, Task

HEAD_FAMILIES = ("prior", "to_teacher", "attributes", "region")
"""The order in which the weights of heads are drawn, by the first part of their names; others come last."""


def network_spec(
    run: Run,
    data: TrainingSet,
    model: ModelSettings,
    objectives: Iterable[Objective],
    *,
    teachers: Mapping[str, Network],
) -> NetworkSpec:
    """The spec of a network whose heads are those that its objectives need."""
    table = attribute_table(run.data)
    channels = VIEW_MAPS | (run.priors.channels if run.priors is not None else {})
    widths: dict[str, HeadSpec] = {}
    for objective in objectives:
        for name, head in objective.needs().heads.items():
            width = head.width
            if width == "attributes":
                assert table is not None, "settings require a table of attributes"
                width = len(table.names)
            elif isinstance(width, str):
                family, _, of = width.partition(".")
                if family == "map":
                    width = channels[of]
                else:
                    teacher = teachers[teacher_of(objective) or next(iter(teachers))].backbone
                    width = {"embedding": teacher.embedding_dim, "patch": teacher.patch_dim}[of]
            widths[name] = HeadSpec(reads=head.reads, width=width)

    def drawn(name: str) -> tuple[int, str]:
        family = name.partition("/")[0]
        return (HEAD_FAMILIES.index(family) if family in HEAD_FAMILIES else len(HEAD_FAMILIES)), name

    manifest = run.dataset.manifest
    return NetworkSpec(
        model=model,
        classes=data.class_names,
        image_size=run.data.image_size,
        mean=manifest.image_mean,
        std=manifest.image_std,
        heads={name: widths[name] for name in sorted(widths, key=drawn)},
        attributes=table.names if table is not None and "attributes" in widths else (),
    )


def new_network(run: Run, spec: NetworkSpec, *, place: int, weights: str | None) -> Network:
    """A network with first weights that depend on the run's seed and its place among the networks alone."""
    return build_network(spec, seed=run.seed * 1000 + place, weights=weights)


def teacher_network(run: Run, name: str) -> Network:
    """The network of a teacher, on CPU: as the stage `teach` left it, or as its weights are where it is never trained.

    A teacher that is never trained has no logits, and sees images normalised as its weights expect.
    """
    teacher = run.settings.teachers[name]
    if teacher.objectives:
        return load_network(run.folder.teacher(name))[1]
    config: Any = timm.get_pretrained_cfg(teacher.model.name)
    spec = NetworkSpec(
        model=teacher.model, classes=(), image_size=run.data.image_size, mean=config.mean, std=config.std
    )
    return build_network(spec, seed=run.seed, weights=teacher.weights).eval()


def make_learner(
    run: Run,
    network: Network,
    *,
    settings: TeacherSettings | StudentSettings,
    training: TrainingSettings,
    total_steps: int,
) -> Learner:
    """Puts a network into its engine; every rank calls it with the same weights."""
    micro_batch_size = run.micro_batch_size(training)
    optimizer = settings.optimizer
    engine = run.make_engine(
        network,
        settings=settings.engine,
        parameter_groups=parameter_groups(
            network, weight_decay=optimizer.weight_decay, layer_decay=optimizer.layer_decay
        ),
        optimizer=optimizer,
        world=run.world,
        accumulation=training.batch_size // (micro_batch_size * run.world.size),
        micro_batch_size=micro_batch_size,
        precision=run.precision(training),
    )
    return Learner(
        engine=engine,
        network=network,
        objectives=settings.objectives,
        optimizer=optimizer,
        schedule=settings.schedule,
        total_steps=total_steps,
    )


@dataclass(frozen=True)
class Stage:
    """A training stage: what does not change over the attempts at it."""

    run: Run
    task: Task
    data: TrainingSet
    name: str
    training: TrainingSettings
    augment: AugmentSettings

    def execute(self, *, folder_of: Callable[[str], Path]) -> None:
        """Trains from the newest whole checkpoint to the end, and saves each learner into `folder_of` its name."""
        run, training = self.run, self.training
        checkpoints = Checkpoints(run.folder.checkpoints(self.name), world=run.world, keep=training.keep_checkpoints)
        # dropout must not depend on what this process did before; a checkpoint brings the state of its step
        torch.manual_seed(run.seed * 100_003 + run.world.rank)
        maps = run.maps_of(self.data.split.name, self.task.maps)
        digests = {f"map {name!r}": digest for name, digest in maps.digests.items()} if maps is not None else {}
        digests = {"packed images": run.dataset.manifest.fingerprint, **digests}
        inputs = Inputs(digests, tuple(self.data.unreadable.tolist()), run.world)
        parts: dict[str, Part] = {**self.task.engines, "random": RandomState(run.world), "inputs": inputs}

        def attempt(start_step: int, skipped_steps: frozenset[int]) -> None:
            self._train(checkpoints, parts, start_step=start_step, skipped=skipped_steps)

        skipped = Skipped(run.folder.skipped(self.name), limit=training.max_skipped_steps, world=run.world)
        train_past_divergence(attempt, checkpoints=checkpoints, parts=parts, skipped=skipped, world=run.world)
        for name, learner in self.task.learners.items():
            weights = learner.engine.weights()
            if run.world.rank == 0:
                run.folder.check_fence()
                save_network(folder_of(name), learner.spec, weights)
        run.world.barrier()

    def _train(
        self, checkpoints: Checkpoints, parts: Mapping[str, Part], *, start_step: int, skipped: frozenset[int]
    ) -> None:
        """One attempt, from `start_step` to the end."""
        run, plan, micro_batch_size = self.run, self._plan(skipped), self.run.micro_batch_size(self.training)
        board = None
        if run.world.rank == 0:
            if start_step:
                logger.info(f"{self.name}: continues after step {start_step} of {plan.total_steps}")
            board = Board(run.folder.tensorboard / self.name, start_step=start_step)
            board.quarantine(start_step, Quarantine(run.folder.quarantine, limit=1.0))
            run.folder.check_fence()  # the logs of a newer attempt stay
            truncate(run.folder.sample_log(self.name), from_attempt=checkpoints.attempt)
        sample_log = SampleLog(
            run.folder.sample_log(self.name),
            attempt=checkpoints.attempt,
            world=run.world,
            micro_batch_size=micro_batch_size,
            start_step=start_step,
        )
        monitor = Monitor(run, self.task, board)
        with (
            closing(board) if board is not None else nullcontext(),
            Progress(self.name, plan.total_steps, unit="steps", start=start_step, shown=board is not None) as progress,
            closing(self._batches(start_step, plan)) as batches,
        ):
            train(
                self.task,
                sample_log.record(batches, steps=plan.steps_from(start_step), micro_batches=plan.micro_batches),
                plan=plan,
                start_step=start_step,
                checkpoints=checkpoints,
                parts={**parts, "sample_log": sample_log},
                meter=Meter(
                    sinks=(board, EventSink(run, stage=self.name), ProgressSink(progress)) if board is not None else (),
                    world=run.world,
                    images_per_step=self.training.batch_size,
                    timer=step_timer(run, board, stage=self.name) if board is not None else StepTimer(),
                ),
                guard=NormGuard(spike=self.training.spike),
                hooks=Hooks(evaluate=monitor.evaluate, panels=monitor.panels),
                world=run.world,
            )

    def _plan(self, skipped: frozenset[int]) -> Plan:
        training = self.training
        total_steps = training.num_steps(self.data.num_samples)
        evaluates = self.run.data.val is not None and self.run.settings.evaluate is not None
        return Plan(
            total_steps=total_steps,
            micro_batches=training.batch_size // (self.run.micro_batch_size(training) * self.run.world.size),
            log_every=training.log_every,
            checkpoint_every=training.checkpoint_every,
            evaluate_every=training.evaluate_every or max(1, total_steps // 10) if evaluates else None,
            panels_every=training.panels_every or max(1, total_steps // 5),
            skipped=skipped,
        )

    def _batches(self, start_step: int, plan: Plan) -> Generator[Batch, None, None]:
        run, data = self.run, self.data
        return training_batches(
            data.split,
            order=sample_order(run, self.training, data),
            targets={"class": data.label_N},
            maps=run.maps_of(data.split.name, self.task.maps),
            views=run.view_plans(self.task.views, self.augment),
            seed=run.seed,
            rank=run.world.rank,
            world_size=run.world.size,
            micro_batch_size=run.micro_batch_size(self.training),
            start_step=start_step,
            stop_step=plan.total_steps,
            skipped=plan.skipped,
            loader=run.data.loader,
        )


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
