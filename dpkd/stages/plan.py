"""What each stage of a run depends on and makes, which stages are left to do, and the first screen that shows it."""

from collections.abc import Collection, Sequence
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
from dpkd.stages.attributes import recorded_attributes

STAGES = ("pack", "prepare", "teach", "distill", "evaluate", "export")
"""The stages by the names that a command takes; a teacher that is not called `teacher` has a stage `teach-<name>`."""
POOL_STAGES = ("pack", "prepare")
"""Stages that map work over items; the others run in the training workers."""

CADENCE = frozenset(
    {"log_every", "evaluate_every", "panels_every", "checkpoint_every", "keep_checkpoints", "max_skipped_steps"}
)
"""Training settings that may change while a stage is under way, because its weights do not depend on them."""


def teaching_stages(settings: Settings) -> dict[str, str]:
    """The teacher that each stage of teaching trains, by the name of the stage."""
    return {"teach" if name == "teacher" else f"teach-{name}": name for name in settings.trained_teachers}


def stages_of(settings: Settings, names: Collection[str] = STAGES) -> list[str]:
    """The stages of these names that the settings ask for, in order."""
    wanted = {
        "pack": ["pack"],
        "prepare": ["prepare"],
        "teach": list(teaching_stages(settings)),
        "distill": ["distill"],
        "evaluate": ["evaluate"] if settings.evaluate is not None else [],
        "export": ["export"] if settings.export is not None else [],
    }
    return [stage for name, stages in wanted.items() if name in names for stage in stages]


def _trains(stage: str) -> bool:
    return stage == "distill" or stage.startswith("teach")


def stage_inputs(stage: str, settings: Settings) -> dict[str, Any]:
    """The settings that a stage's results depend on, as plain values."""
    data, seed = settings.data.model_dump(mode="json"), {"seed": settings.run.seed}
    if stage == "pack":
        return seed | _pick(data, "source", "splits", "group_pattern", "samples_per_shard", "window")
    if stage == "prepare":
        return settings.prepare.sealed().model_dump(mode="json")
    if stage == "export":
        return settings.model_dump(mode="json")["export"]
    if stage == "evaluate":
        evaluate = settings.model_dump(mode="json")["evaluate"]
        return seed | {"data": _pick(data, "train", "val", "test"), stage: evaluate} | _attributes(stage, settings)
    teachers = {name: teacher.model_dump(mode="json") for name, teacher in settings.teachers.items()}
    if stage == "distill":
        part = settings.distill.model_dump(mode="json")
        followed = {
            name: _pick(teacher, "during_distill", *(() if teacher["objectives"] else ("model", "weights")))
            for name, teacher in teachers.items()
        }
        results = {"distill": part, "teachers": followed}
    else:
        name = teaching_stages(settings)[stage]
        part = teachers[name]
        del part["during_distill"]
        results = {"teachers": {name: part}}
    part["training"] = {key: value for key, value in part["training"].items() if key not in CADENCE}
    results["data"] = _pick(data, "image_size", "map_size", "views", "train", "labels")
    return seed | results | _attributes(stage, settings)


def stage_outputs(stage: str, settings: Settings) -> list[str | Path]:
    """The files that a finished stage has made, as far as other stages build on them or users take them away."""
    folder = RunFolder(settings.run.dir)
    shards = settings.data.shards or str(folder.path / "shards")
    if stage == "pack":
        return [] if settings.data.source is None else [storage.join(shards, DATASET_NAME)]
    if stage == "prepare":
        return [storage.join(set_url(shards, settings.prepare.name), PRIORS_NAME)]
    if stage == "evaluate":
        return [folder.path / EVALUATION_NAME]
    if stage == "distill":
        students = settings.distill.students.items()
        folders = [folder.students / name for name, _ in students]
        folders += [folder.baselines / name for name, student in students if student.baseline]
        live = [name for name, teacher in settings.teachers.items() if teacher.during_distill != "frozen"]
        folders += [folder.live_teachers / name for name in live]
    elif stage == "export":
        folders = [folder.export / name for name in settings.distill.students]
    else:
        folders = [folder.teacher(teaching_stages(settings)[stage])]
    return sorted(path for made in folders for path in made.glob("[!.]*"))


def _attributes(stage: str, settings: Settings) -> dict[str, Any]:
    """The rows of the table of attributes, where the stage's results depend on them."""
    teaching, prefix = teaching_stages(settings), ""
    if stage in teaching:
        prefix = f"teachers.{teaching[stage]}."
    elif stage == "distill" and all(teacher.during_distill == "frozen" for teacher in settings.teachers.values()):
        prefix = "distill."
    learned = [objective for key, objective in settings.objectives.items() if key.startswith(prefix)]
    if not any("attributes" in objective.needs().targets for objective in learned):
        return {}
    url = settings.data.shards or str(RunFolder(settings.run.dir).path / "shards")
    return {"attributes": recorded_attributes(settings.data, url=url, everywhere=stage == "evaluate")}


def find_faults(folder: RunFolder, stages: Sequence[str]) -> dict[str, list[str]]:
    """Faults of the files that finished stages made; reads and hashes them all, so call it once a start."""
    return {stage: folder.faults(stage) for stage in stages}


def left_to_do(
    folder: RunFolder, settings: Settings, stages: Sequence[str], *, faults: dict[str, list[str]] | None = None
) -> list[str]:
    """The stages, in order, that are not done under these settings, and those that build on one of them.

    A stage with `faults` is not done. To pack or to prepare, asked for alone, is always left: files that were damaged
    since are found and made anew. Raises `UserError` with the difference where a finished or interrupted stage began
    with other settings, and where a network is damaged that its stage cannot make again from a checkpoint.
    """
    faults = faults or {}
    for stage in stages:
        if stage == "pack" or _trains(stage):  # the other stages are done again under other settings
            folder.refuse_contradiction(stage, stage_inputs(stage, settings))
        if _trains(stage) and faults.get(stage) and not CheckpointStore(folder.checkpoints(stage)).committed():
            raise UserError(
                f"{'; '.join(faults[stage])}, and the stage {stage} has no checkpoint that it could be made from "
                "again: restore it from a copy, or choose another run.dir to train anew"
            )
    again = [stage for stage in POOL_STAGES if list(stages) == [stage]]
    left = [
        stage
        for stage in stages
        if faults.get(stage) or not folder.is_done(stage, stage_inputs(stage, settings)) or stage in again
    ]
    trains = any(_trains(stage) for stage in left)
    return [stage for stage in stages if stage in left or (trains and stage in ("evaluate", "export"))]


def log_plan(settings: Settings, folder: RunFolder, *, left: Sequence[str], stages: Sequence[str]) -> None:
    """The first screen: what happens, stage by stage, and what is done already."""
    logger.info(f"dpkd {__version__} · {folder.path} · seed {settings.run.seed}")
    for stage in stages:
        logger.info(f"  {stage:<9} {'' if stage in left else 'done: '}{_describe(stage, settings)}")


def _describe(stage: str, settings: Settings) -> str:
    if stage == "pack":
        source = settings.data.source
        return "uses the shards of data.shards" if source is None else f"{source.kind} {source.path} into shards"
    if stage == "prepare":
        return "prior maps: " + (", ".join(prior.name for prior in settings.prepare.chosen) or "none")
    if stage == "distill":
        students = [f"{name} ({student.model.name})" for name, student in settings.distill.students.items()]
        baselines = [name for name, student in settings.distill.students.items() if student.baseline]
        beside = f", beside {', '.join(baselines)} on labels alone" if baselines else ""
        teachers = ", ".join(f"{teacher.during_distill} {name}" for name, teacher in settings.teachers.items())
        return f"{teachers or 'no teacher'} into {', '.join(students)}{beside}, {_length(settings.distill.training)}"
    if stage == "evaluate":
        assert settings.evaluate is not None, "the stage is left out without settings"
        episodes = settings.evaluate.episodes
        shots = ", ".join(str(shot) for shot in episodes.shots)
        splits = ", ".join(settings.data.evaluated_splits) or "no split"
        return f"{episodes.episodes:,} episodes, {episodes.way}-way {shots}-shot, on {splits}"
    if stage == "export":
        return "students as timm folders" + (" and ONNX" if settings.export and settings.export.onnx else "")
    teacher = settings.teachers[teaching_stages(settings)[stage]]
    return f"{teacher.model.name}, {_length(teacher.training)}"


def _length(training: TrainingSettings) -> str:
    if training.steps is not None:
        length = f"{training.steps:,} step{'' if training.steps == 1 else 's'}"
    else:
        length = f"{training.epochs:g} epoch{'' if training.epochs == 1 else 's'}"
    return f"{length} of {training.batch_size} images"


def _pick(tree: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: tree[key] for key in keys}
