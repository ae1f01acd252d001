"""The settings of a run: its sections, and the checks across them before work starts. Loads no heavy package."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from dpkd.config import TAKES_TEXT, Config, PathText, apply_override, explain, read_yaml_file
from dpkd.data.settings import (
    GLOBAL,
    AllLabels,
    AugmentSettings,
    ClassSplits,
    FractionSplits,
    GivenSplits,
    LoaderSettings,
    Source,
    Splits,
    ViewSettings,
    VisibleLabels,
    Window,
)
from dpkd.engine.settings import EngineSettings, OptimizerSettings, ScheduleSettings, TrainingSettings
from dpkd.errors import UserError, refuse_secrets
from dpkd.evaluation.settings import EpisodeSettings, ProbeSettings
from dpkd.launch.settings import LauncherSettings
from dpkd.models.settings import FigureGroundPooling, Model
from dpkd.objectives import AnyObjective
from dpkd.objectives.base import VIEW_MAPS, Objective, teacher_of
from dpkd.objectives.logits import LogitDistillation
from dpkd.objectives.supervised import Supervised
from dpkd.priors import BUILT_IN, Prior
from dpkd.priors.base import sealed
from dpkd.priors.derived import DERIVED, derivable

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class RunSettings(Config):
    """The run folder and the seed that everything random is drawn from."""

    dir: PathText = "runs/default"
    """A path that every worker sees."""
    checkpoints: PathText | None = None
    """Where checkpoints are written: a path, or any fsspec URL of a place that is this run's alone; none puts them
    into the run folder."""
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


def _source_of_path(value: Any) -> Any:
    """A plain path or URL as the source that its ending shows."""
    if not isinstance(value, str):
        return value
    if re.search(r"\.(csv|tsv|jsonl|parquet)(\?.*)?$", value):
        return {"kind": "table", "path": value}
    return {"kind": "shards" if value.endswith(".tar") else "folder", "path": value}


class DataSettings(Config):
    """The images: where they come from, how they are split and packed, and at what size networks see them."""

    source: Annotated[Source | None, BeforeValidator(_source_of_path), TAKES_TEXT] = None
    """None uses the shards that `shards` has already."""
    shards: PathText | None = None
    """Where the packed data set is, local or any fsspec URL; none puts it into the run folder."""
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
    views: dict[Name, ViewSettings] = {GLOBAL: ViewSettings()}
    """Views of each image that objectives may ask for; `global` is always there."""
    train: str = "train"
    """Split that networks are trained on."""
    val: str | None = "val"
    """Split for choices, evaluated during training; none evaluates nothing during training."""
    test: str | None = "test"
    """Split for the report, evaluated at the end."""
    labels: VisibleLabels = AllLabels()
    attributes: PathText | None = None
    """Table of what experts state of the classes, `.yaml` or `.csv` (`dpkd/data/attributes.py` draws it)."""
    loader: LoaderSettings = LoaderSettings()

    @model_validator(mode="after")
    def _has_a_global_view(self) -> "DataSettings":
        if GLOBAL not in self.views:
            raise ValueError(f"views has {', '.join(self.views)}, and every objective reads {GLOBAL!r}: add it")
        return self

    def check_splits(self) -> None:
        """Raises `ValueError` where `train`, `val` or `test` names a split that `splits` does not make."""
        splits = self.splits
        if isinstance(splits, GivenSplits):
            return
        if isinstance(splits, FractionSplits):
            made = list(splits.fractions)
        else:
            made = list(splits.classes if isinstance(splits, ClassSplits) else splits.files)
        for role, split in (("train", self.train), ("val", self.val), ("test", self.test)):
            if split is not None and split not in made:
                raise ValueError(f"data.{role} names the split {split!r}, but data.splits makes {', '.join(made)}")

    @property
    def evaluated_splits(self) -> tuple[str, ...]:
        """The validation and the test split, as far as there are any."""
        return tuple(dict.fromkeys(split for split in (self.val, self.test) if split is not None))


class PrepareSettings(Config):
    """The prior maps computed once for every sample."""

    name: str = Field("default", pattern=r"^\w[\w.-]*$")
    """Name of the prior set: `<shards>/priors/<name>`."""
    priors: Annotated[tuple[Prior, ...] | None, BeforeValidator(lambda value: None if value == "auto" else value)] = (
        None
    )
    """`auto` (and none) computes what the objectives and poolings of this run need."""

    @property
    def chosen(self) -> tuple[Prior, ...]:
        """The priors, which `Settings` chooses where they are `auto`."""
        assert self.priors is not None, "Settings chooses the priors"
        return self.priors

    def sealed(self) -> "PrepareSettings":
        """The same, with the priors bound to the weights they name; raises `UserError` that names weights missing."""
        return self.model_copy(update={"priors": sealed(self.chosen)})


class TeacherSettings(Config):
    """A teacher; one without objectives is never trained."""

    model: Model
    weights: PathText | None = None
    """A safetensors file or PyTorch state dict to start from; none starts from scratch."""
    objectives: tuple[AnyObjective, ...] = ()
    augment: AugmentSettings = AugmentSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    engine: EngineSettings = EngineSettings()
    training: TrainingSettings = TrainingSettings(epochs=100)
    during_distill: Literal["frozen", "live", "ema"] = "frozen"
    """`live` goes on learning its own objectives in the same steps; with `ema` students follow its averaged weights."""

    @model_validator(mode="after")
    def _can_learn(self) -> "TeacherSettings":
        if self.during_distill != "frozen" and not self.objectives:
            raise ValueError(f"during_distill={self.during_distill} needs objectives to learn: give some, or frozen")
        if self.during_distill == "ema" and self.engine.ema is None:
            raise ValueError("during_distill=ema follows averaged weights: set engine.ema, for example 0.999")
        if not self.objectives and self.weights is None and not self.model.pretrained:
            raise ValueError("a teacher without objectives is never trained: give it weights, or objectives")
        return self


class StudentSettings(Config):
    """One student: its network, objectives, optimizer, schedule and engine."""

    model: Model
    weights: PathText | None = None
    """A safetensors file or PyTorch state dict to start from; none starts from scratch."""
    objectives: tuple[AnyObjective, ...] = (Supervised(), LogitDistillation())
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    engine: EngineSettings = EngineSettings()
    baseline: bool = False
    """Also train the same network on labels alone: same images and steps, mean pooling; see `baselines`."""


def _without_nulls(value: Any) -> Any:
    """The entries of a mapping that are not null: `key=null` takes one out."""
    return {key: entry for key, entry in value.items() if entry is not None} if isinstance(value, dict) else value


class DistillSettings(Config):
    """Online distillation: one forward of each teacher serves every student."""

    students: Annotated[dict[Name, StudentSettings], BeforeValidator(_without_nulls)] = Field(min_length=1)
    augment: AugmentSettings = AugmentSettings()
    training: TrainingSettings = TrainingSettings(epochs=100)
    placement: Literal["together"] = "together"
    """Every rank has all students and its share of the teachers."""


class EvaluateSettings(Config):
    """What is measured on the validation and test splits, for teachers, students and baselines alike."""

    episodes: EpisodeSettings = EpisodeSettings()
    episodes_while_training: int = Field(400, ge=2)
    probes: ProbeSettings | None = ProbeSettings()


class ExportSettings(Config):
    """The forms in which students are exported."""

    onnx: bool = True
    tolerance: float = Field(1e-3, gt=0)
    """Largest difference between ONNX and PyTorch embeddings, relative to the largest of them."""


class Settings(Config):
    """Everything that a run is given; `runs/<name>/settings.yaml` holds it resolved."""

    run: RunSettings = RunSettings()
    launcher: LauncherSettings = LauncherSettings()
    data: DataSettings
    prepare: PrepareSettings = PrepareSettings()
    teachers: Annotated[dict[Name, TeacherSettings], BeforeValidator(_without_nulls)] = {}
    distill: DistillSettings
    evaluate: EvaluateSettings | None = EvaluateSettings()
    export: ExportSettings | None = ExportSettings()

    @property
    def networks(self) -> dict[str, TeacherSettings | StudentSettings]:
        """Teachers and students by their key."""
        students = {f"distill.students.{name}": student for name, student in self.distill.students.items()}
        return {**{f"teachers.{name}": teacher for name, teacher in self.teachers.items()}, **students}

    @property
    def objectives(self) -> dict[str, Objective]:
        """All objectives by their key."""
        return {
            f"{key}.objectives.{position}": objective
            for key, network in self.networks.items()
            for position, objective in enumerate(network.objectives)
        }

    @property
    def trained_teachers(self) -> dict[str, TeacherSettings]:
        """The teachers that have something to learn."""
        return {name: teacher for name, teacher in self.teachers.items() if teacher.objectives}

    @property
    def trainings(self) -> dict[str, TrainingSettings]:
        """The length and batch of every training, by its key."""
        teachers = {f"teachers.{name}.training": teacher.training for name, teacher in self.trained_teachers.items()}
        return {**teachers, "distill.training": self.distill.training}

    @property
    def world_sizes(self) -> tuple[int, ...]:
        """The numbers of training processes that may share every batch equally, ascending; empty where the launcher
        is to choose.
        """
        workers = self.launcher.workers
        if workers is None:
            return ()
        fewest = workers if self.launcher.min_workers is None else self.launcher.min_workers
        return tuple(
            size for size in range(fewest, workers + 1) if all(each.divides(size) for each in self.trainings.values())
        )

    @model_validator(mode="after")
    def _sections_fit(self) -> "Settings":
        self.data.check_splits()
        for key, objective in self.objectives.items():
            self._check_objective(key, objective)
        for key, network in self.networks.items():
            names = Counter(objective.name for objective in network.objectives if objective.name is not None)
            if names and names.most_common(1)[0][1] > 1:
                raise ValueError(f"{key}.objectives has two of the name {names.most_common(1)[0][0]!r}: rename one")
        if self.data.attributes is not None and not self._uses_attributes():
            raise ValueError(
                f"data.attributes={self.data.attributes} is used by no objective: add {{kind: attributes}} to the "
                "objectives of a network, or leave the table out"
            )
        most = self.launcher.workers or 1
        for key, training in self.trainings.items():
            training.check_division(key, self.launcher.min_workers or most, most)
        if self.launcher.workers is not None and not self.world_sizes:
            raise ValueError(
                f"no number of workers from {self.launcher.min_workers} to {self.launcher.workers} shares the batches "
                f"of {', '.join(self.trainings)} equally"
            )
        if self.prepare.priors is None:
            prepare = self.prepare.model_copy(update={"priors": tuple(self._needed_priors())})
            object.__setattr__(self, "prepare", prepare)  # the model is frozen, and this is still its making
        for key, name in self._maps_used():
            self._check_map(key, name)
        return self

    def _uses_attributes(self) -> bool:
        return any("attributes" in objective.needs().targets for objective in self.objectives.values())

    def _check_objective(self, key: str, objective: Objective) -> None:
        """The objective has its teacher, its table, its views and its maps, and images keep the colours it reads."""
        needs, student = objective.needs(), key.startswith("distill.")
        network = key.split(".")[2 if student else 1]
        if needs.teacher:
            names = list(self.teachers)
            self._check_teacher(key, objective, among=names if student else names[: names.index(network)])
        if "attributes" in needs.targets and self.data.attributes is None:
            raise ValueError(f"{key} learns attributes, and data.attributes names no table: give a .yaml or .csv file")
        for view in needs.views:
            if view not in self.data.views:
                raise ValueError(f"{key} reads the view {view!r}; data.views has {', '.join(self.data.views)}")
        if objective.control == "shuffle" and not needs.maps:
            raise ValueError(f"{key}.control=shuffle exchanges prior maps, and {objective.kind!r} reads none")
        for part, augment in self._augments(network, student=student) if needs.own_colours else ():
            if augment.brightness or augment.contrast or augment.saturation:
                raise ValueError(
                    f"{key} {needs.own_colours}, and {part}.augment changes colours: set its brightness, contrast and "
                    "saturation to 0, or leave the bound out"
                )

    def _check_teacher(self, key: str, objective: Objective, *, among: list[str]) -> None:
        """The objective follows one of these teachers, and that has the outputs which the objective needs."""
        known = ", ".join(among) or "none"
        name = teacher_of(objective) or (among[0] if len(among) == 1 else None)
        if name is None:
            raise ValueError(f"{key}.teacher: {objective.kind!r} follows a teacher; name one (there are: {known})")
        if name not in among:
            raise ValueError(f"{key}.teacher: no teacher {name!r} comes before this network (there are: {known})")
        if "logits" in objective.needs().teacher and not self.teachers[name].objectives:
            raise ValueError(
                f"{key}: the teacher {name!r} is never trained, so it has no logits of these classes: follow its "
                "features, or give it objectives"
            )

    def _augments(self, name: str, *, student: bool) -> Iterator[tuple[str, AugmentSettings]]:
        """The augmentations under which a network learns, by their section."""
        if not student:
            yield f"teachers.{name}", self.teachers[name].augment
        if student or self.teachers[name].during_distill != "frozen":
            yield "distill", self.distill.augment

    def _maps_used(self) -> Iterator[tuple[str, str]]:
        for key, network in self.networks.items():
            if isinstance(network.model.pooling, FigureGroundPooling):
                yield f"{key}.model.pooling", network.model.pooling.prior
        for key, objective in self.objectives.items():
            yield from ((key, name) for name in objective.needs().maps)

    def _needed_priors(self) -> Iterator[Prior]:
        """A prior with its defaults for every stored map that this run uses."""
        key_of = {name: key for key, name in self._maps_used() if name not in VIEW_MAPS or key.endswith(".pooling")}
        stored = {
            each: key_of[name] for name in key_of for each in (DERIVED[name].needs if name in DERIVED else [name])
        }
        kinds = {prior.model_fields["kind"].default: prior for prior in BUILT_IN}
        for name, key in stored.items():
            kind, _, of = name.partition("-")
            if kind not in kinds or kind == "learned":
                raise ValueError(
                    f"{key} uses the prior {name!r}, which no built-in prior computes: add "
                    f"{_as_prior(name)} to prepare.priors (built in: {', '.join(kinds)})"
                )
            yield kinds[kind](of=of) if of else kinds[kind]()  # type: ignore[call-arg]

    def _check_map(self, key: str, name: str) -> None:
        """The map is computed, and holds amounts where it is to be predicted or to weigh."""
        prepared = {prior.name: prior for prior in self.prepare.chosen}
        pooling = key.endswith(".pooling")
        if name in derivable(prepared) or (name in VIEW_MAPS and name not in prepared and not pooling):
            return
        if name not in prepared:
            missing = [each for each in (DERIVED[name].needs if name in DERIVED else [name]) if each not in prepared]
            raise ValueError(
                f"{key} uses the prior {name!r}; prepare.priors makes {', '.join(sorted(prepared)) or 'none'}: "
                f"add {', '.join(_as_prior(each) for each in missing)} to prepare.priors, or leave it at auto"
            )
        if prepared[name].nearest:
            raise ValueError(f"{key}: {name!r} holds region labels, which are no amounts to predict or weigh by")
        amount = pooling or name in self.objectives[key].needs().amounts
        if amount and prepared[name].channels > 1:
            raise ValueError(f"{key}: {name!r} has several channels; one amount a patch is needed, as of 'saliency'")


def _as_prior(name: str) -> str:
    """How a prior of that name is listed: `expert-mask` is {kind: expert, of: mask}."""
    kind, dash, of = name.partition("-")
    return f"{{kind: {kind}{f', of: {of}' if dash else ''}{', model: …' if kind == 'learned' else ''}}}"


def load_settings(path: str | Path, overrides: list[str]) -> Settings:
    """Reads a YAML file, applies `key.path=value` overrides in order, and checks the whole.

    Raises `UserError` that names the key, its value and the way out.
    """
    tree = read_yaml_file(Path(path))
    for override in overrides:
        apply_override(tree, override, root=Settings)
    return parse_settings(tree, origin=str(path))


def parse_settings(tree: dict[str, Any], *, origin: str) -> Settings:
    """Checks a tree of plain values and returns it as `Settings`; `origin` is named in errors."""
    try:
        refuse_secrets(tree)
        return Settings.model_validate(tree)
    except RecursionError:
        raise UserError(f"{origin}: a value is inside itself, or lists are nested too deeply") from None
    except ValidationError as error:
        raise UserError(f"{origin}: {explain(error, Settings)}") from None
