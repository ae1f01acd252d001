"""The training stages: networks trained in the same steps, from images to saved weights.

`teach` writes `teachers/<name>`. `distill` trains all students together with their teachers and writes
`students/<name>`, and `teachers-live/<name>` for a teacher that is trained during distillation. `baseline-<name>`
writes `baselines/<name>`.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from dpkd.data.order import ClassAwareOrder, Order, OrderWithout, SampleOrder, rank_micro_batches
from dpkd.data.stream import load_batches
from dpkd.engine.peak import peak_tflops
from dpkd.engine.settings import TrainingSettings
from dpkd.io import storage
from dpkd.log import Progress, logger
from dpkd.models.network import Network
from dpkd.models.saved import save_network
from dpkd.report.summary import figure_or_none
from dpkd.settings import DistillSettings, TeacherSettings
from dpkd.stages.baselines import baselines
from dpkd.stages.monitor import Monitor
from dpkd.stages.networks import followed_teachers, frozen_teacher, make_learner, new_network, teacher_network
from dpkd.stages.run import Run, TrainingSet, supervision, training_set
from dpkd.train.checkpoint import Checkpoints, Part
from dpkd.train.divergence import NormGuard, train_past_divergence
from dpkd.train.loop import Plan, train
from dpkd.train.meter import Meter
from dpkd.train.parts import Inputs, RandomState
from dpkd.train.sample_log import SampleLog, truncate
from dpkd.train.task import Learner, Predictor, Task


class TrainingStage(NamedTuple):
    """The networks that a stage trains, its training split, and its settings."""

    task: Task
    data: TrainingSet
    settings: TeacherSettings | DistillSettings


def teach(run: Run, name: str, *, stage: str) -> None:
    """Trains one teacher, from its newest checkpoint on, and saves its weights."""
    _train_task(run, teach_task(run, name), stage=stage, folder_of=run.folder.teacher)


def teach_task(run: Run, name: str) -> TrainingStage:
    """The teacher and those that it follows."""
    settings, names = run.settings.teachers[name], list(run.settings.teachers)
    data = training_set(run, settings.training, settings.objectives)
    followed = followed_teachers(run, settings.objectives, names[: names.index(name)])
    place = -list(run.settings.trained_teachers).index(name)  # the places of students start at 1
    return _stage_of_one(run, data, name, settings, followed=followed, place=place)


def _stage_of_one(
    run: Run, data: TrainingSet, name: str, settings: TeacherSettings, *, followed: Mapping[str, Network], place: int
) -> TrainingStage:
    """The stage of one network, which follows these teachers."""
    training = settings.training
    network = new_network(run, data, settings, teachers=followed, place=place)
    learner = make_learner(run, data, network, settings=settings, training=training)
    teachers = {other: frozen_teacher(run, other, teacher, training) for other, teacher in followed.items()}
    labels = supervision(run, data, training)
    return TrainingStage(Task({name: learner}, teachers=teachers, supervision=labels, seed=run.seed), data, settings)


def distill(run: Run) -> None:
    """Trains all students, from the newest checkpoint on, and saves their weights."""
    _train_task(run, distill_task(run), stage="distill", folder_of=run.folder.network)


def distill_task(run: Run) -> TrainingStage:
    """All students and teachers."""
    settings, training = run.settings.distill, run.settings.distill.training
    objectives = [objective for student in settings.students.values() for objective in student.objectives]
    data = training_set(run, training, objectives)
    networks = followed_teachers(run, objectives, run.settings.teachers)
    learning = [name for name, teacher in run.settings.teachers.items() if teacher.during_distill != "frozen"]
    networks |= {name: teacher_network(run, name) for name in learning if name not in networks}
    learners: dict[str, Learner] = {}
    teachers: dict[str, Predictor] = {}
    for name, network in networks.items():
        if name not in learning:
            teachers[name] = frozen_teacher(run, name, network, training)
            continue
        teacher = run.settings.teachers[name]
        learners[name] = make_learner(run, data, network, settings=teacher, training=training)
        if teacher.during_distill == "ema":
            teachers[name] = learners[name]
    for place, (name, student) in enumerate(settings.students.items(), start=1):
        network = new_network(run, data, student, teachers=networks, place=place)
        learners[f"student-{name}"] = make_learner(run, data, network, settings=student, training=training)
    live = [name for name in networks if name not in teachers]
    labels = supervision(run, data, training)
    task = Task(learners, teachers=teachers, live_teachers=live, supervision=labels, seed=run.seed)
    return TrainingStage(task, data, settings)


def train_baseline(run: Run, name: str, *, stage: str) -> None:
    """Trains a student's network on labels alone, from its newest checkpoint on, and saves its weights.

    Its first weights are those of the student. Without a mask and visible labels of two classes there is no baseline.
    """
    student, settings = baselines(run.settings)[name]
    data = training_set(run, run.settings.distill.training, [])
    visible = data.label_N[data.label_N >= 0] if data.label_NK is None else data.label_NK[data.label_NK >= 0]
    from_masks = any("mask" in objective.needs().targets for objective in settings.objectives)
    if not from_masks and len(np.unique(visible)) < 2:
        if run.world.rank == 0:
            logger.info(f"{stage}: left out, because labels of fewer than two classes are visible")
        return
    place = 1 + list(run.settings.distill.students).index(student)
    alone = _stage_of_one(run, data, f"baseline-{name}", settings, followed={}, place=place)
    _train_task(run, alone, stage=stage, folder_of=run.folder.network)


def _train_task(run: Run, trained: TrainingStage, *, stage: str, folder_of: Callable[[str], Path]) -> None:
    """Trains from the newest whole checkpoint to the end, and saves each learner in the folder `folder_of(name)`."""
    task, data, settings = trained
    training, world = settings.training, run.world
    if training.imbalance == "auto" and world.rank == 0:
        logger.info(f"{stage}: {data.recipe(training)}")
    checkpoints = Checkpoints(run.folder.checkpoints(stage), world=world, keep=training.keep_checkpoints)
    # dropout must not depend on earlier work of this process; a checkpoint restores the state of its step
    torch.manual_seed(run.seed * 100_003 + world.rank)
    maps = run.maps_of(data.split.name, task.maps | settings.augment.maps)
    digests = {"packed images": run.dataset.manifest.fingerprint}
    digests |= {f"map {name!r}": digest for name, digest in maps.digests.items()} if maps is not None else {}
    digests["readable samples"] = storage.digest(data.unreadable.tobytes())
    parts: dict[str, Part] = {name: engine.state for name, engine in task.engines.items()}
    parts |= {"random": RandomState(world), "inputs": Inputs(digests, world)}
    total_steps = training.num_steps(data.num_samples)
    evaluates = run.data.val in run.measured_splits and run.settings.evaluate is not None
    plan = Plan(
        total_steps=total_steps,
        micro_batches=run.micro_batches(training),
        log_every=training.log_every,
        checkpoint_every=training.checkpoint_every,
        evaluate_every=training.evaluate_every or max(1, total_steps // 10) if evaluates else None,
        panels_every=training.panels_every or max(1, total_steps // 5),
    )
    attempt = partial(_attempt, run, trained, stage=stage, checkpoints=checkpoints, parts=parts)
    train_past_divergence(
        lambda start_step, skipped: attempt(start_step=start_step, plan=replace(plan, skipped=skipped)),
        checkpoints=checkpoints,
        parts=parts,
        skipped=run.folder.skipped(stage),
        limit=training.max_skipped_steps,
        world=world,
    )
    for name, learner in task.learners.items():
        weights = learner.engine.state.weights()
        if world.rank == 0:
            run.folder.check_fence()
            save_network(folder_of(name), learner.spec, weights)
    world.barrier()


def _attempt(
    run: Run,
    trained: TrainingStage,
    *,
    stage: str,
    checkpoints: Checkpoints,
    parts: Mapping[str, Part],
    start_step: int,
    plan: Plan,
) -> None:
    """Trains from `start_step` to the end of the plan."""
    task, data, settings = trained
    training, world, micro_batch_size = settings.training, run.world, run.micro_batch_size(settings.training)
    log_folder, attempt = run.folder.sample_log(stage), checkpoints.attempt
    if world.rank == 0:
        if start_step:
            logger.info(f"{stage}: continues after step {start_step} of {plan.total_steps}")
        run.folder.check_fence()  # must not remove the logs of a newer attempt
        truncate(log_folder, from_attempt=attempt)
    sample_log = SampleLog(
        log_folder, attempt=attempt, world=world, micro_batch_size=micro_batch_size, start_step=start_step
    )
    order, steps = sample_order(run, training, data), plan.steps_from(start_step)
    views = run.view_plans(task.views, settings.augment)
    batches = load_batches(
        data.split,
        rank_micro_batches(order, steps, rank=world.rank, world_size=world.size, micro_batch_size=micro_batch_size),
        targets=data.targets,
        maps=run.maps_of(data.split.name, task.maps | settings.augment.maps),
        views=views,
        seed=run.seed,
        loader=run.data.loader,
    )
    shown = world.rank == 0
    with (
        Progress(stage, plan.total_steps, unit="steps", start=start_step, shown=shown) as progress,
        closing(Monitor(run, task, stage=stage, start_step=start_step, progress=progress)) as monitor,
        closing(batches),
    ):
        train(
            task,
            sample_log.record(batches, steps=steps, micro_batches=plan.micro_batches),
            plan=plan,
            start_step=start_step,
            checkpoints=checkpoints,
            parts={**parts, "sample_log": sample_log},
            meter=Meter(
                world=world,
                images_per_step=training.batch_size,
                report=monitor.report if shown else None,
                flops_per_image=lambda: figure_or_none(f"FLOPs of {stage}", partial(task.flops_per_image, views)),
                peak_tflops=training.peak_tflops or peak_tflops(world.device, precision=run.precision(training)),
            ),
            guard=NormGuard(spike=training.spike),
            evaluate=monitor.evaluate,
            draw_panels=monitor.panels,
            world=world,
        )


def sample_order(run: Run, training: TrainingSettings, data: TrainingSet) -> SampleOrder:
    """The order of samples in batches, without the samples that cannot be read."""
    order: SampleOrder
    sampling = data.recipe(training).kind if training.sampling == "auto" else training.sampling
    if sampling == "class_aware" or training.labelled_share is not None:
        by_masks = run.data.masks is not None and sampling != "class_aware"
        label_N = np.delete(data.mask_N if by_masks else data.label_N, data.unreadable)
        class_N = label_N if sampling == "class_aware" else np.minimum(label_N, 0)  # else one class has all
        share = training.labelled_share
        order = ClassAwareOrder(class_N, seed=run.seed, global_batch_size=training.batch_size, labelled_share=share)
    else:
        num_lost = Counter(data.split.locate(i)[0] for i in data.unreadable.tolist())
        order = Order(
            [size - num_lost[shard] for shard, size in enumerate(data.split.shard_sizes)],
            seed=run.seed,
            global_batch_size=training.batch_size,
            block_shards=run.data.loader.block_shards,
        )
    return OrderWithout(order, data.unreadable) if len(data.unreadable) else order
