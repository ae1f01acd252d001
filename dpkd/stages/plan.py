"""What each stage of a run is given, which stages are left to do, and the first screen that says so."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpkd import __version__
from dpkd.data.shards import MANIFEST_NAME as DATASET_NAME
from dpkd.engine.settings import TrainingSettings
from dpkd.errors import UserError
from dpkd.io import storage
from dpkd.io.checkpoint_store import CheckpointStore
from dpkd.log import logger
from dpkd.priors.store import MANIFEST_NAME as PRIORS_NAME
from dpkd.priors.store import set_url
from dpkd.report.summary import EVALUATION_NAME
from dpkd.run.folder import RunFolder
from dpkd.settings import Settings
from dpkd.stages.statements import learns_attributes, recorded_attributes

STAGES = ("pack", "prepare", "teach", "distill", "evaluate", "export")
POOL_STAGES = ("pack", "prepare")
"""Stages that map work over items; the others run in the training workers."""
FIXED_STAGES = ("pack", "teach", "distill")
"""Stages that refuse to go on under other settings; the others are cheap or incremental, and simply run again."""

TRAINING_STAGES = ("teach", "distill")

CADENCE = frozenset(
    {"log_every", "evaluate_every", "panels_every", "checkpoint_every", "keep_checkpoints", "max_skipped_steps"}
)
"""Training settings that may change while a stage is under way, because its weights do not depend on them."""


def given(stage: str, settings: Settings) -> dict[str, Any]:
    """The settings that a stage's results depend on, as plain values."""
    data, seed = settings.data.model_dump(mode="json"), {"seed": settings.run.seed}
    if stage == "pack":
        return seed | _pick(data, "source", "splits", "group_pattern", "samples_per_shard")
    if stage == "prepare":
        return settings.prepare.sealed().model_dump(mode="json")
    if stage in TRAINING_STAGES:
        part = (settings.teach if stage == "teach" else settings.distill).model_dump(mode="json")
        part["training"] = {key: value for key, value in part["training"].items() if key not in CADENCE}
        results = seed | {"data": _pick(data, "image_size", "map_size", "train", "labels"), stage: part}
        return results | _attributes(stage, settings)
    if stage == "evaluate":
        results = seed | {
            "data": _pick(data, "train", "val", "test"),
            "evaluate": settings.evaluate.model_dump(mode="json"),
        }
        return results | _attributes(stage, settings)
    return settings.export.model_dump(mode="json")


def makes(stage: str, settings: Settings) -> list[str | Path]:
    """The files that a finished stage has made, as far as other stages build on them or users take them away."""
    folder = RunFolder(settings.run.dir)
    shards = settings.data.shards or str(folder.path / "shards")
    if stage == "pack":
        return [] if settings.data.source is None else [storage.join(shards, DATASET_NAME)]
    if stage == "prepare":
        return [storage.join(set_url(shards, settings.prepare.name), PRIORS_NAME)]
    if stage == "evaluate":
        return [folder.path / EVALUATION_NAME]
    folders = [folder.teacher]
    if stage == "distill":
        students = settings.distill.students.items()
        folders = [folder.students / name for name, _ in students]
        folders += [folder.baselines / name for name, student in students if student.baseline]
        folders += [folder.live_teacher] if settings.distill.teacher == "live" else []
    elif stage == "export":
        folders = [folder.export / name for name in settings.distill.students]
    return sorted(path for each in folders for path in each.glob("[!.]*"))


def _attributes(stage: str, settings: Settings) -> dict[str, Any]:
    """What the table of attributes says, where the stage's results depend on it."""
    objectives = settings.all_objectives
    if stage == "teach":
        objectives = list(settings.teach.objectives)
    elif stage == "distill" and settings.distill.teacher == "frozen":
        objectives = [each for student in settings.distill.students.values() for each in student.losses]
    if not learns_attributes(objectives):
        return {}
    url = settings.data.shards or str(RunFolder(settings.run.dir).path / "shards")
    return {"attributes": recorded_attributes(settings.data, url=url, everywhere=stage == "evaluate")}


def left_to_do(folder: RunFolder, settings: Settings, stages: Sequence[str]) -> list[str]:
    """The stages, in order, that are not done under these settings, and those that build on one of them.

    To pack or to prepare, asked for alone, is always left: files that were damaged since are found and made anew.
    Raises `UserError` with the difference where a finished or interrupted stage began with other settings, and where a
    network is damaged that its stage cannot make again from a checkpoint.
    """
    for stage in stages:
        if stage in FIXED_STAGES:
            folder.refuse_contradiction(stage, given(stage, settings))
        if stage in TRAINING_STAGES:
            _refuse_to_train_anew(folder, stage)
    again = [stage for stage in POOL_STAGES if list(stages) == [stage]]
    left = [stage for stage in stages if not folder.is_done(stage, given(stage, settings)) or stage in again]
    trains = any(stage in TRAINING_STAGES for stage in left)
    return [stage for stage in stages if stage in left or (trains and stage in ("evaluate", "export"))]


def _refuse_to_train_anew(folder: RunFolder, stage: str) -> None:
    """Raises `UserError` where a finished stage would be trained from its start for a file that is damaged."""
    faults = folder.faults(stage)
    if faults and not CheckpointStore(folder.checkpoints(stage)).committed():
        raise UserError(
            f"{'; '.join(faults)}, and no checkpoint of the stage {stage} stands that it could be made from again: "
            "restore it from a copy, or choose another run.dir to train anew"
        )


def say_faults(folder: RunFolder, stages: Sequence[str]) -> None:
    """A line for each file that a finished stage made and that is no longer as it made it."""
    for stage in stages:
        for fault in folder.faults(stage):
            logger.info(f"{fault}: the stage {stage} makes it again")


def say_plan(settings: Settings, folder: RunFolder, *, left: Sequence[str], stages: Sequence[str]) -> None:
    """The first screen: what happens, stage by stage, and what is done already."""
    logger.info(f"dpkd {__version__} · {folder.path} · seed {settings.run.seed}")
    for stage in stages:
        logger.info(f"  {stage:<9} {'' if stage in left else 'done: '}{_describe(stage, settings)}")


def _describe(stage: str, settings: Settings) -> str:
    if stage == "pack":
        source = settings.data.source
        return "uses the shards that stand already" if source is None else f"{source.kind} {source.path} into shards"
    if stage == "prepare":
        return "prior maps: " + (", ".join(prior.name for prior in settings.prepare.priors) or "none")
    if stage == "teach":
        return f"{settings.teach.model.name}, {_length(settings.teach.training)}"
    if stage == "distill":
        students = [f"{name} ({each.model.name})" for name, each in settings.distill.students.items()]
        baselines = [name for name, each in settings.distill.students.items() if each.baseline]
        beside = f", beside {', '.join(baselines)} on labels alone" if baselines else ""
        teacher = settings.distill.teacher
        return f"{teacher} teacher into {', '.join(students)}{beside}, {_length(settings.distill.training)}"
    if stage == "evaluate":
        episodes = settings.evaluate.episodes
        shots = ", ".join(str(shot) for shot in episodes.shots)
        splits = f"{settings.data.val}, {settings.data.test}"
        return f"{episodes.episodes:,} episodes, {episodes.way}-way {shots}-shot, on {splits}"
    return "students as timm folders" + (" and ONNX" if settings.export.onnx else "")


def _length(training: TrainingSettings) -> str:
    if training.steps is not None:
        length = f"{training.steps:,} step{'' if training.steps == 1 else 's'}"
    else:
        length = f"{training.epochs:g} epoch{'' if training.epochs == 1 else 's'}"
    return f"{length} of {training.batch_size} images"


def _pick(tree: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: tree[key] for key in keys}
