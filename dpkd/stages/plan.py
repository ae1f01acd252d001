"""The inputs and outputs of each stage, the stages that are not done, and the first screen of a run.

Loads no heavy package, because the driver of a run uses it too.
"""

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from dpkd import __version__
from dpkd.backends.factory import launcher_kind, machine
from dpkd.data.settings import GLOBAL
from dpkd.data.shards import MANIFEST_NAME as DATASET_NAME
from dpkd.data.shards import Dataset
from dpkd.engine.settings import TrainingSettings
from dpkd.errors import UserError
from dpkd.io import storage
from dpkd.io.checkpoint_store import CheckpointStore
from dpkd.log import logger
from dpkd.priors.store import MANIFEST_NAME as PRIORS_NAME
from dpkd.priors.store import set_url
from dpkd.report.summary import EVALUATION_NAME
from dpkd.run.folder import RunFolder
from dpkd.settings import DataSettings, DistillSettings, PrepareSettings, Settings, TeacherSettings
from dpkd.stages import STAGES
from dpkd.stages.baselines import baselines
from dpkd.stages.check_data import attribute_table, check_splits, trained_classes

POOL_STAGES = ("pack", "prepare")
"""Stages that run in a pool; the other stages run in the training workers."""

CADENCE = [
    "log_every",
    "evaluate_every",
    "panels_every",
    "checkpoint_every",
    "keep_checkpoints",
    "max_skipped_steps",
    "peak_tflops",
]
"""Training settings that may change during a stage, because its weights do not depend on them."""


def dataset_url(folder: RunFolder, data: DataSettings) -> str:
    """The path or URL of the packed images."""
    return data.shards or str(folder.path / "shards")


class Trained(NamedTuple):
    """What a training stage trains."""

    kind: str
    """`teach`, `distill` or `baselines`, as on the command line."""
    name: str
    """Of the teacher or the baseline."""
    key: str
    """The settings with its `training`; a baseline trains like its student."""
    settings: TeacherSettings | DistillSettings


def training_stages(settings: Settings) -> dict[str, Trained]:
    """The training stages in order, by name."""
    stages = {
        "teach" if name == "teacher" else f"teach-{name}": Trained("teach", name, f"teachers.{name}", teacher)
        for name, teacher in settings.trained_teachers.items()
    }
    stages["distill"] = Trained("distill", "", "distill", settings.distill)
    return stages | {
        f"baseline-{name}": Trained("baselines", name, "distill", baseline.settings)
        for name, baseline in baselines(settings).items()
    }


def first_stage(settings: Settings, key: str) -> str:
    """The first stage with the network of this key."""
    return next(stage for stage, trained in training_stages(settings).items() if trained.key in (key, "distill"))


def left_trainings(settings: Settings, left: Collection[str]) -> dict[str, TrainingSettings]:
    """The training settings of the stages that are left, by their key."""
    keys = {
        f"{trained.key}.training"
        for stage, trained in training_stages(settings).items()
        if stage in left and trained.kind != "baselines"
    }
    return {key: training for key, training in settings.trainings.items() if key in keys}


def stages_of(settings: Settings, names: Collection[str] = STAGES) -> list[str]:
    """The stages among `names` that the settings turn on, in order."""
    is_on = {"evaluate": settings.evaluate is not None and settings.data.evaluated_splits, "export": settings.export}
    kinds = {stage: trained.kind for stage, trained in training_stages(settings).items()}
    every = [*POOL_STAGES, *kinds, *(stage for stage, turned_on in is_on.items() if turned_on)]
    return [stage for stage in every if kinds.get(stage, stage) in names]


def stage_inputs(stage: str, settings: Settings) -> dict[str, Any]:
    """The settings that a stage's results depend on, as plain values."""
    tree: dict[str, Any] = settings.model_dump(mode="json")
    data, seed, prefix = tree["data"], {"run": {"seed": settings.run.seed}}, ""

    def pick(*keys: str) -> dict[str, Any]:
        return {key: data[key] for key in keys}

    if stage == "pack":
        return seed | {"data": pick("source", "splits", "group_pattern", "samples_per_shard", "window")}
    if stage == "prepare":
        return {"prepare": settings.prepare.sealed().model_dump(mode="json")}
    if stage == "export":
        return {"export": tree["export"]} | pick("masks")
    if stage == "evaluate":
        results = {"data": pick("train", "val", "test", "masks"), "evaluate": tree["evaluate"]}
    else:
        trained = training_stages(settings)[stage]
        part = trained.settings.model_dump(mode="json")
        part["training"] = {key: value for key, value in part["training"].items() if key not in CADENCE}
        if trained.kind == "distill":
            kept = dict.fromkeys(settings.trained_teachers, ("during_distill",))
            teachers = {
                name: {key: teacher[key] for key in kept.get(name, ("during_distill", "model", "weights"))}
                for name, teacher in tree["teachers"].items()
            }
            if all(teacher["during_distill"] == "frozen" for teacher in teachers.values()):
                prefix = "distill."
            results = {"distill": part, "teachers": teachers}
            for student in part["students"].values():
                del student["baseline"]
        elif trained.kind == "baselines":
            prefix, results = "baselines.", {"baselines": {trained.name: part}}
        else:
            prefix, results = f"{trained.key}.", {"teachers": {trained.name: part}}
            del part["during_distill"]
        read = (objective.needs().views for key, objective in settings.objectives.items() if key.startswith(prefix))
        views = {name: data["views"][name] for name in sorted({GLOBAL}.union(*read))}  # others may change
        results["data"] = pick("image_size", "map_size", "train", "labels", "masks") | {"views": views}
    learned = [objective for key, objective in settings.objectives.items() if key.startswith(prefix)]
    table = attribute_table(settings.data)
    if table is not None and any("attributes" in objective.needs().targets for objective in learned):
        # the rows of other classes may change: trained networks are evaluated zero-shot on them
        url, classes = dataset_url(RunFolder(settings.run.dir), settings.data), table.classes
        if stage != "evaluate" and storage.exists(storage.join(url, DATASET_NAME)):
            classes = tuple(trained_classes(Dataset.open(url), settings.data))
        known = {name: row for name, row in table.known().items() if name in classes}
        results["attributes"] = {"names": list(table.names), "classes": known}
    return seed | results


def stage_outputs(stage: str, settings: Settings) -> list[str | Path]:
    """The files of a finished stage that other stages read or users copy."""
    folder = RunFolder(settings.run.dir)
    shards = dataset_url(folder, settings.data)
    if stage == "pack":
        return [] if settings.data.source is None else [storage.join(shards, DATASET_NAME)]
    if stage == "prepare":
        return [storage.join(set_url(shards, settings.prepare.name), PRIORS_NAME)]
    if stage == "evaluate":
        return [path for path in (folder.path / EVALUATION_NAME,) if path.exists()]  # without a label there is none
    parents = {"distill": [folder.students, folder.live_teachers], "export": [folder.export]}
    if stage in parents:
        return sorted(path for parent in parents[stage] for path in parent.glob("[!.]*/[!.]*"))
    trained = training_stages(settings)[stage]
    place = folder.teacher(trained.name) if trained.kind == "teach" else folder.baselines / trained.name
    return sorted(place.glob("[!.]*"))


def recorded(stage: str, folder: RunFolder, settings: Settings) -> AbstractContextManager[None]:
    """Records the body as the stage in the run folder: as running, and then as done, with its files."""
    return folder.running(stage, stage_inputs(stage, settings), makes=partial(stage_outputs, stage, settings))


def left_to_do(
    folder: RunFolder, settings: Settings, stages: Sequence[str], *, faults: dict[str, list[str]] | None = None
) -> list[str]:
    """The stages, in order, that are not done with these settings, and the stages that depend on them.

    A stage with `faults` is not done. Pack or prepare as the only stage always runs, to find and rewrite damaged files.
    Raises `UserError` with the differences if a finished or interrupted stage began with other settings, and if a
    network is damaged and its stage has no checkpoint.
    """
    faults, trained = faults or {}, training_stages(settings).keys()
    # a stage that has saved nothing, and the other stages, run again with other settings
    bound = folder.bound(trained)
    fixed = [stage for stage in stages if stage in bound or (stage == "pack" and (bound or folder.is_done(stage)))]
    folder.refuse_contradictions({stage: stage_inputs(stage, settings) for stage in fixed})
    for stage in fixed:
        if stage in trained and faults.get(stage) and not CheckpointStore(folder.checkpoints(stage)).committed():
            raise UserError(
                f"{'; '.join(faults[stage])}, and the stage {stage} has no checkpoint to write it again: restore it "
                "from a copy, or set another run.dir to train again"
            )
    if settings.run.from_ is not None and (
        damaged := [fault for stage in POOL_STAGES for fault in faults.get(stage, ())]
    ):
        raise UserError(f"{'; '.join(damaged)}, and run.from is only read: mend that run, or set another run.from")
    again = [stage for stage in POOL_STAGES if list(stages) == [stage] and settings.run.from_ is None]
    left = [
        stage
        for stage in stages
        if faults.get(stage) or not folder.is_done(stage, stage_inputs(stage, settings)) or stage in again
    ]
    trains = not trained.isdisjoint(left)
    return [stage for stage in stages if stage in left or (trains and stage in ("evaluate", "export"))]


def with_origin(settings: Settings, folder: RunFolder) -> Settings:
    """The settings with the images and maps of `run.from`, whose finished stages the folder borrows.

    Prior maps that this run does not use may be among them. Raises `UserError` with the keys if a stage of the other
    run has other settings, or is not done before its maps are.
    """
    place = settings.run.from_
    if place is None:
        return settings
    own, origin = folder.stages(), RunFolder(place)
    records = origin.stages() | own
    for stage in POOL_STAGES:
        if records.get(stage, {}).get("status") != "done":
            raise UserError(
                f"run.from={place}: its stage {stage} is not done: name a run with packed and prepared images"
            )
    prepared = PrepareSettings.model_validate(records["prepare"]["given"]["prepare"])
    wanted = settings.prepare.sealed()
    if missing := [prior.name for prior in wanted.chosen if prior not in prepared.chosen]:
        raise UserError(
            f"run.from={place} has no prior map {', '.join(missing)} with these settings (it has "
            f"{', '.join(prior.name for prior in prepared.chosen) or 'none'}): use those, or leave run.from out"
        )
    (manifest,) = records["prepare"]["made"]
    manifest = manifest if storage.local_path(manifest) is None else str(origin.path.absolute() / manifest)
    shards = manifest.removesuffix(f"/priors/{prepared.name}/{PRIORS_NAME}")
    if settings.data.shards not in (None, shards):
        raise UserError(
            f"data.shards={settings.data.shards} is not {shards} of run.from={place}: leave one of them out"
        )
    data = settings.data.model_copy(update={"shards": shards})
    settings = settings.model_copy(update={"data": data, "prepare": prepared})
    lacking = [stage for stage in stages_of(settings, [*POOL_STAGES, "teach"]) if stage not in own]
    way_out = f"Take the values of run.from={place}, or leave run.from out."
    folder.borrow(origin, {stage: stage_inputs(stage, settings) for stage in lacking}, way_out=way_out)
    return settings


def refuse_missing_inputs(settings: Settings, left: Collection[str]) -> None:
    """Raises `UserError` with the key if the stages that are left need a source, labels, split or weights that lack.

    Splits are checked if the images are packed, and the files of a source if they are on a disk of this machine.
    """
    source, url = settings.data.source, dataset_url(RunFolder(settings.run.dir), settings.data)
    if "pack" in left and source is not None:
        path = storage.local_path(source.path)
        if source.kind != "shards" and path is not None and not path.exists():  # shards may be a pattern
            raise UserError(f"data.source.path={source.path} does not exist: give the folder or table of the images")
        learners = [key for key, objective in settings.objectives.items() if "class" in objective.needs().targets]
        unlabelled = source.kind == "table" and source.label_column is None and not source.multi_label
        if unlabelled and learners and not {*left} <= {*POOL_STAGES}:
            column = f"data.source={{kind: table, path: {source.path}, label_column: …}}"
            raise UserError(f"{learners[0]} learns from labels, and data.source.label_column is not set: give {column}")
    elif {*left} - {"pack", "export"} and (source is None or storage.exists(storage.join(url, DATASET_NAME))):
        check_dataset(Dataset.open(url), settings, left)
    for key, network in settings.networks.items():
        due = network.weights is not None and first_stage(settings, key) in left
        if due and not storage.is_file(str(network.weights)):
            raise UserError(f"{key}.weights={network.weights} is not a file: give a safetensors file or a state dict")


def refuse_missing_packages(settings: Settings, left: Collection[str]) -> None:
    """Raises `UserError` if a package of the extra `train` is missing that the stages that are left need."""
    missing = {name for name in ("deepspeed", "ray", "tensorboard") if find_spec(name) is None}
    needed = {"ray"} & missing if launcher_kind(settings.launcher) == "ray" else set()
    if missing and not needed and {*left} - {*POOL_STAGES}:
        kinds = {network.engine.kind for network in settings.networks.values()}
        several = "auto" in kinds and machine(settings.launcher).gpus > 1
        needed = {"tensorboard", *(["deepspeed"] if several or "deepspeed" in kinds else [])} & missing
    if needed:
        raise UserError(f"this run needs {', '.join(sorted(needed))}: pip install 'dpkd[train]'")


def plan_run(settings: Settings, folder: RunFolder, stages: Sequence[str]) -> list[str]:
    """The stages that are not done; logs the first screen: the work and status of each stage."""
    faults = {stage: folder.faults(stage) for stage in stages}
    left = left_to_do(folder, settings, stages, faults=faults)
    refuse_missing_packages(settings, left)
    refuse_missing_inputs(settings, left)
    logger.info(f"dpkd {__version__} · {folder.path} · seed {settings.run.seed}")
    width = max(map(len, (*stages, "workers  ")))
    for stage in stages:
        logger.info(f"  {stage:<{width}} {'' if stage in left else 'done: '}{_describe(stage, settings)}")
    for stage in stages:
        for fault in faults[stage]:
            logger.info(f"{fault}: the stage {stage} runs again")
    return left


def _describe(stage: str, settings: Settings) -> str:
    if stage == "pack":
        source = settings.data.source
        return "uses the shards of data.shards" if source is None else f"{source.kind} {source.path} into shards"
    if stage == "prepare":
        return "prior maps: " + (", ".join(prior.name for prior in settings.prepare.chosen) or "none")
    if stage == "evaluate" and settings.evaluate is not None:
        episodes = settings.evaluate.episodes
        figures = "accuracy on known classes" if episodes is None else f"{episodes.episodes:,} episodes"
        figures += ", masks" if settings.data.masks is not None else ""
        return f"{figures} on {', '.join(settings.data.evaluated_splits)}"
    if stage == "export":
        return "students as timm folders" + (" and ONNX" if settings.export and settings.export.onnx else "")
    trained = training_stages(settings)[stage]
    part, training = trained.settings, trained.settings.training
    if isinstance(part, DistillSettings):
        teachers = ", ".join(f"{teacher.during_distill} {name}" for name, teacher in settings.teachers.items())
        students = ", ".join(f"{name} ({student.model.name})" for name, student in part.students.items())
        networks = f"{teachers or 'no teacher'} into {students}"
    else:
        kinds = {"masks" if objective.kind == "segmentation" else "labels" for objective in part.objectives}
        learns = f" on {' and '.join(sorted(kinds))} alone" if trained.kind == "baselines" else ""
        networks = part.model.name + learns
    length = f"{training.epochs:g} epochs" if training.steps is None else f"{training.steps:,} steps"
    return f"{networks}, {length} of {training.batch_size} images"


def check_dataset(dataset: Dataset, settings: Settings, left: Collection[str]) -> None:
    """Raises the errors of `check_splits` for a packed data set and the stages that are left."""
    place, trainings = f"the data set at {dataset.url}", left_trainings(settings, left)
    check_splits(settings, dataset.manifest.classes, dataset.manifest.splits, place=place, trainings=trainings)
