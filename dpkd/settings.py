"""The settings of a run: its sections, and the checks across them before work starts. Loads no heavy package."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from dpkd.config import Config
from dpkd.data.settings import (
    AllLabels,
    AugmentSettings,
    ClassSplits,
    FractionSplits,
    GivenSplits,
    LoaderSettings,
    Source,
    Splits,
    VisibleLabels,
    Window,
)
from dpkd.engine.settings import EngineSettings, OptimizerSettings, ScheduleSettings, TrainingSettings
from dpkd.errors import UserError, refuse_secrets
from dpkd.evaluation.settings import EpisodeSettings, ProbeSettings
from dpkd.launch.settings import LauncherSettings
from dpkd.models.settings import FigureGroundPooling, ModelSettings
from dpkd.objectives.settings import (
    COLOUR_STATISTICS,
    VIEW_MAPS,
    Attributes,
    LogitDistillation,
    RegionBounds,
    StudentObjective,
    Supervised,
    TeacherObjective,
    maps_taken,
)
from dpkd.priors import DEFAULT_PRIORS, Prior
from dpkd.priors.base import sealed
from dpkd.priors.derived import DERIVED, derivable
from dpkd.settings_errors import explain
from dpkd.strict_yaml import read_yaml


class DataSettings(Config):
    """The images: where they come from, how they are split and packed, and at what size networks see them."""

    source: Source | None = None
    """None uses the shards that stand at `shards` already."""
    shards: str | None = None
    """Where the packed data set stands, local or any fsspec URL; none puts it into the run folder."""
    splits: Splits = GivenSplits()
    group_pattern: str | None = None
    """Regular expression whose first group, found in a sample's path, names its group (patient, sign, tile)."""
    samples_per_shard: int = Field(1024, ge=1)
    window: Window | None = None
    """How values of more than 8 bits (16-bit, signed, float) become 0 to 255; without it such images are refused."""
    bad_limit: float = Field(0.01, ge=0, le=1)
    """Largest share of samples that may be quarantined before the run stops."""
    image_size: int = Field(64, ge=16)
    map_size: int | None = Field(None, ge=4)
    """Side of the prior maps in a batch; none takes a quarter of the image size."""
    train: str = "train"
    """Split that networks are trained on."""
    val: str = "val"
    """Split for choices, evaluated during training."""
    test: str = "test"
    """Split for the report, evaluated at the end."""
    labels: VisibleLabels = AllLabels()
    attributes: str | None = None
    """Table of what experts say of the classes, `.yaml` or `.csv` (`dpkd/data/attributes.py` draws it)."""
    loader: LoaderSettings = LoaderSettings()

    @field_validator("source", mode="before")
    @classmethod
    def _source_from_path(cls, value: object) -> object:
        """A plain path or URL stands for the source that its ending shows."""
        if not isinstance(value, str):
            return value
        if re.search(r"\.(csv|tsv|jsonl|parquet)(\?.*)?$", value):
            return {"kind": "table", "path": value}
        return {"kind": "shards" if value.endswith(".tar") else "folder", "path": value}


class PrepareSettings(Config):
    """The prior maps computed once for every sample."""

    name: str = Field("default", pattern=r"^\w[\w.-]*$")
    """Name of the prior set: `<shards>/priors/<name>`."""
    priors: tuple[Prior, ...] = DEFAULT_PRIORS

    def sealed(self) -> "PrepareSettings":
        """The same, with the priors bound to the weights they name; raises `UserError` that names weights missing."""
        return self.model_copy(update={"priors": sealed(self.priors)})


class TeachSettings(Config):
    """The teacher and how it is trained."""

    model: ModelSettings
    objectives: tuple[TeacherObjective, ...] = (Supervised(),)
    augment: AugmentSettings = AugmentSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    engine: EngineSettings = EngineSettings()
    training: TrainingSettings = TrainingSettings(epochs=100)


class StudentSettings(Config):
    """One student: its network, losses, optimizer, schedule and engine."""

    model: ModelSettings
    losses: tuple[StudentObjective, ...] = (Supervised(), LogitDistillation())
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    engine: EngineSettings = EngineSettings()
    baseline: bool = False
    """Also train the same network on labels alone: same images and steps, mean pooling; see `baselines`."""


class DistillSettings(Config):
    """Online distillation: one forward of the teacher serves every student."""

    teacher: Literal["frozen", "live"] = "frozen"
    """`live` goes on learning the teacher's own objectives in the same steps."""
    students: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")], StudentSettings] = Field(min_length=1)
    augment: AugmentSettings = AugmentSettings()
    training: TrainingSettings = TrainingSettings(epochs=100)


class EvaluateSettings(Config):
    """What is measured on the validation and test splits, for teacher, students and baselines alike."""

    episodes: EpisodeSettings = EpisodeSettings()
    episodes_while_training: int = Field(400, ge=2)
    probes: ProbeSettings | None = ProbeSettings()


class ExportSettings(Config):
    """The forms in which students leave."""

    onnx: bool = True
    tolerance: float = Field(1e-3, gt=0)
    """Largest difference between ONNX and PyTorch embeddings, relative to the largest of them."""


class RunSettings(Config):
    """The run folder and the seed that everything random is drawn from."""

    dir: str = "runs/default"
    """A path that every worker sees."""
    checkpoints: str | None = None
    """Where checkpoints stand: a path, or any fsspec URL of a place that is this run's alone; none puts them into the
    run folder."""
    seed: int = Field(0, ge=0)

    @field_validator("dir")
    @classmethod
    def _is_a_path(cls, value: str) -> str:
        if "://" in value:
            raise ValueError(
                f"{value!r} is a URL, and a run folder is a path: give one on a disk that all workers see; "
                "data.source, data.shards and run.checkpoints may be URLs"
            )
        return value


class Settings(Config):
    """Everything a run was asked for; `runs/<name>/settings.yaml` holds it resolved."""

    run: RunSettings = RunSettings()
    launcher: LauncherSettings = LauncherSettings()
    data: DataSettings
    prepare: PrepareSettings = PrepareSettings()
    teach: TeachSettings
    distill: DistillSettings
    evaluate: EvaluateSettings = EvaluateSettings()
    export: ExportSettings = ExportSettings()

    @property
    def objectives(self) -> dict[str, tuple[StudentObjective, ...]]:
        """The objectives of every network, by their key."""
        students = {f"distill.students.{name}.losses": each.losses for name, each in self.distill.students.items()}
        return {"teach.objectives": self.teach.objectives, **students}

    @property
    def all_objectives(self) -> list[StudentObjective]:
        """The objectives of all networks."""
        return [objective for objectives in self.objectives.values() for objective in objectives]

    @property
    def world_sizes(self) -> tuple[int, ...]:
        """The numbers of training processes that may share every batch equally, ascending; empty where the launcher
        is to choose.
        """
        workers = self.launcher.workers
        if workers is None:
            return ()
        fewest = workers if self.launcher.min_workers is None else self.launcher.min_workers
        trainings = (self.teach.training, self.distill.training)
        return tuple(size for size in range(fewest, workers + 1) if all(_divides(each, size) for each in trainings))

    @model_validator(mode="after")
    def _parts_fit(self) -> "Settings":
        _priors_are_prepared(self)
        _statements_fit(self)
        for stage, training in (("teach", self.teach.training), ("distill", self.distill.training)):
            _batch_divides(f"{stage}.training", training, launcher=self.launcher)
        if self.launcher.workers is not None and not self.world_sizes:
            raise ValueError(
                f"no number of workers from {self.launcher.min_workers} to {self.launcher.workers} shares both "
                "teach.training.batch_size and distill.training.batch_size equally"
            )
        _splits_exist(self.data)
        return self


def load_settings(path: str | Path, overrides: list[str]) -> Settings:
    """Reads a YAML file, applies `key.path=value` overrides in order, and checks the whole.

    Raises `UserError` that names the key, its value and the way out.
    """
    tree = _read_yaml(Path(path))
    for override in overrides:
        _apply(tree, override)
    return parse_settings(tree, origin=str(path))


def parse_settings(tree: dict[str, Any], *, origin: str) -> Settings:
    """Checks a tree of plain values and returns it as `Settings`; `origin` is named in errors."""
    refuse_secrets(tree)
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{origin}: {explain(error, Settings)}") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"--config {path}: cannot be read ({error}); give the path of a YAML file") from None
    try:
        tree = read_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"--config {path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"--config {path}: holds {type(tree).__name__}, expected sections such as data, teach, distill")
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override!r}: an override is written key.path=value, for example teach.training.steps=100")
    try:
        value = read_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"{override!r}: the value is not valid YAML: {error}") from None
    *parents, last = key.split(".")
    node: Any = tree
    for name in parents:
        node = _child(node, name, override)
    if isinstance(node, list):
        node[_position(node, last, override)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise UserError(f"{override!r}: {'.'.join(parents)} is the plain value {node!r} and has no key {last!r}")


def _child(node: Any, name: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_position(node, name, override)]
    if not isinstance(node, dict):
        raise UserError(f"{override!r}: {node!r} is a plain value and has no key {name!r}")
    if node.get(name) is None:
        node[name] = {}
    return node[name]


def _position(items: list[Any], name: str, override: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", name) or int(name) >= len(items):
        raise UserError(f"{override!r}: {name!r} is no position in a list of {len(items)}; they count from 0")
    return int(name)


def _priors_are_prepared(settings: Settings) -> None:
    prepared = {prior.name: prior for prior in settings.prepare.priors}
    derived = derivable(prepared)
    for key, name in _priors_used(settings):
        if name in derived or (name in VIEW_MAPS and name not in prepared and not key.endswith(".pooling")):
            continue
        if name not in prepared:
            missing = [each for each in DERIVED[name].needs if each not in prepared] if name in DERIVED else [name]
            raise ValueError(
                f"{key} uses the prior {name!r}; prepare.priors makes {', '.join(sorted(prepared)) or 'none'}: "
                f"add {', '.join(_as_prior(each) for each in missing)} to prepare.priors"
            )
        if prepared[name].nearest:
            raise ValueError(f"{key}: {name!r} holds region labels, which are no amounts to predict or weigh by")
        if prepared[name].channels > 1 and key.endswith(".pooling"):
            raise ValueError(
                f"{key}: {name!r} has several channels; patches are weighed by one amount, as of 'saliency'"
            )


def _as_prior(name: str) -> str:
    """How a prior of that name is asked for: `expert-mask` is {kind: expert, of: mask}."""
    kind, dash, of = name.partition("-")
    return f"{{kind: {kind}{f', of: {of}' if dash else ''}{', model: …' if kind == 'learned' else ''}}}"


def _priors_used(settings: Settings) -> list[tuple[str, str]]:
    used = _of_model("teach.model", settings.teach.model) + _of_objectives(
        "teach.objectives", settings.teach.objectives
    )
    for name, student in settings.distill.students.items():
        key = f"distill.students.{name}"
        used += _of_model(f"{key}.model", student.model) + _of_objectives(f"{key}.losses", student.losses)
    return used


def _of_model(key: str, model: ModelSettings) -> list[tuple[str, str]]:
    pooling = model.pooling
    return [(f"{key}.pooling", pooling.prior)] if isinstance(pooling, FigureGroundPooling) else []


def _of_objectives(
    key: str, objectives: tuple[TeacherObjective, ...] | tuple[StudentObjective, ...]
) -> list[tuple[str, str]]:
    return [(f"{key}.{position}", name) for position, each in enumerate(objectives) for name in maps_taken(each)]


def _statements_fit(settings: Settings) -> None:
    """Attributes have a table, and it is used; regions have a map of one amount, and colours to be bound."""
    objectives = settings.objectives
    for key, several in objectives.items():
        for position, objective in enumerate(several):
            if isinstance(objective, Attributes) and settings.data.attributes is None:
                raise ValueError(
                    f"{key}.{position} learns attributes, and data.attributes names no table: give a .yaml or .csv file"
                )
            if isinstance(objective, RegionBounds):
                _region_can_be_bound(f"{key}.{position}", objective, settings)
        regions = [each.of for each in several if isinstance(each, RegionBounds)]
        if len(set(regions)) < len(regions) or sum(isinstance(each, Attributes) for each in several) > 1:
            raise ValueError(f"{key} asks twice for attributes, or for the region of one map: put the two into one")
    used = any(isinstance(each, Attributes) for each in settings.all_objectives)
    if settings.data.attributes is not None and not used:
        raise ValueError(
            f"data.attributes={settings.data.attributes} is used by no objective: add {{kind: attributes}} to "
            f"{' or '.join(objectives)}, or leave the table out"
        )


def _region_can_be_bound(key: str, objective: RegionBounds, settings: Settings) -> None:
    priors = settings.prepare.priors
    amounts = {prior.name for prior in priors if prior.channels == 1 and not prior.nearest}
    amounts |= set(derivable({prior.name: prior for prior in priors}))
    if objective.of not in amounts:
        raise ValueError(
            f"{key}.of={objective.of!r} is no map of one amount, as a region is predicted after; prepare.priors makes "
            f"{', '.join(sorted(amounts)) or 'none'}"
        )
    live = key.startswith("teach") and settings.distill.teacher == "live"
    parts = ("teach", "distill") if live else (key.partition(".")[0],)
    colours = [bound.statistic for bound in objective.bounds if bound.statistic in COLOUR_STATISTICS]
    for part in parts if colours else ():
        augment = settings.teach.augment if part == "teach" else settings.distill.augment
        if augment.brightness or augment.contrast or augment.saturation:
            raise ValueError(
                f"{key} bounds {colours[0]}, and {part}.augment changes colours: set its brightness, contrast and "
                "saturation to 0, or leave the bound out"
            )


def _divides(training: TrainingSettings, workers: int) -> bool:
    return training.batch_size % ((training.micro_batch_size or 1) * workers) == 0


def _batch_divides(key: str, training: TrainingSettings, *, launcher: LauncherSettings) -> None:
    micro, batch, most = training.micro_batch_size, training.batch_size, launcher.workers or 1
    if micro is not None and batch % micro:
        raise ValueError(f"{key}.batch_size {batch} is no multiple of {key}.micro_batch_size {micro}")
    fewest = launcher.min_workers or most
    if not any(_divides(training, size) for size in range(fewest, most + 1)):
        workers = f"{most}" if fewest == most else f"{fewest} to {most}"
        raise ValueError(
            f"{key}.batch_size {batch} does not divide among {workers} workers"
            f"{f' in micro-batches of {micro}' if micro else ''}; take a multiple of {(micro or 1) * most}"
        )


def _splits_exist(data: DataSettings) -> None:
    splits = data.splits
    if isinstance(splits, GivenSplits):
        return
    if isinstance(splits, FractionSplits):
        named = list(splits.fractions)
    else:
        named = list(splits.classes if isinstance(splits, ClassSplits) else splits.files)
    for role, split in (("train", data.train), ("val", data.val), ("test", data.test)):
        if split not in named:
            raise ValueError(f"data.{role} names the split {split!r}, but data.splits makes {', '.join(named)}")
