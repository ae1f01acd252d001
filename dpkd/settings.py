"""The settings of a run: its sections, and the checks across them before any work. Loads no heavy package."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from dpkd.config import Config, PathText, apply_override, explain, read_yaml_file
from dpkd.data.settings import (
    GLOBAL,
    AllLabels,
    AugmentSettings,
    ClassSplits,
    FileSplits,
    FractionSplits,
    GivenSplits,
    LoaderSettings,
    MaskSettings,
    SourceOrPath,
    Splits,
    ViewSettings,
    VisibleLabels,
    Window,
)
from dpkd.engine.settings import EngineSettings, OptimizerSettings, ScheduleSettings, TrainingSettings
from dpkd.errors import UserError, refuse_secrets
from dpkd.evaluation.seen import Seen
from dpkd.evaluation.settings import EpisodeSettings, ProbeSettings
from dpkd.launch.settings import LauncherSettings
from dpkd.models.settings import FigureGroundPooling, Model
from dpkd.objectives import AnyObjective
from dpkd.objectives.base import VIEW_MAPS, Objective, teacher_of
from dpkd.objectives.logits import LogitDistillation
from dpkd.objectives.supervised import Supervised
from dpkd.priors import BUILT_IN, Prior
from dpkd.priors.base import BatchExtractor
from dpkd.priors.catalogue.regions import Mask
from dpkd.priors.derived import DERIVED, derivable
from dpkd.run.settings import RunSettings

FROM_STORE = (".pooling", ".background")
"""Endings of the keys whose map is stored, and has one channel of amounts; objectives may also compute maps."""

Length = Annotated[float, Field(gt=0)] | Literal["plain"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class DataSettings(Config):
    """The images: their source, splits, packing, and size in training."""

    source: SourceOrPath | None = None
    """None uses the existing data set at `shards`."""
    shards: PathText | None = None
    """Path or any fsspec URL of the packed data set; None means a folder in the run folder."""
    splits: Splits = GivenSplits()
    group_pattern: str | None = None
    """Regular expression; its first group in a sample's path is the name of the sample's group (patient, tile)."""
    samples_per_shard: int = Field(1024, ge=1)
    window: Window | None = None
    """Range of values of more than 8 bits (16-bit, signed, float) that becomes 0 to 255; required for such images."""
    bad_limit: float = Field(0.01, ge=0, le=1)
    """Largest share of quarantined samples that does not stop the run."""
    image_size: int = Field(64, ge=16)
    map_size: int | None = Field(None, ge=4)
    """Side of the prior maps in a batch; None means a quarter of the image size."""
    views: dict[Name, ViewSettings] = {GLOBAL: ViewSettings()}
    """Views of each image for the objectives; `global` is required."""
    train: str = "train"
    """Split for training."""
    val: str | None = "val"
    """Split for choices, evaluated during training; None means no evaluation during training."""
    test: str | None = "test"
    """Split for the report, evaluated at the end."""
    labels: VisibleLabels = AllLabels()
    masks: MaskSettings | None = None
    attributes: PathText | None = None
    """Table of expert attributes of the classes, `.yaml` or `.csv` (`dpkd/data/attributes.py` shows its format)."""
    loader: LoaderSettings = LoaderSettings()

    @model_validator(mode="after")
    def _has_a_global_view(self) -> "DataSettings":
        if GLOBAL not in self.views:
            raise ValueError(f"views has {', '.join(self.views)}, and every objective reads {GLOBAL!r}: add it")
        return self

    def check_splits(self) -> None:
        """Raises `ValueError` if `train`, `val` or `test` names a split that `splits` does not make."""
        splits: Mapping[str, Any]
        match self.splits:
            case FractionSplits(fractions=splits) | ClassSplits(classes=splits) | FileSplits(files=splits):
                for role, split in (("train", self.train), ("val", self.val), ("test", self.test)):
                    if split is not None and split not in splits:
                        raise ValueError(f"data.{role}={split!r} is no split of data.splits ({', '.join(splits)})")

    @property
    def evaluated_splits(self) -> tuple[str, ...]:
        """The validation and the test split, if they are set."""
        return tuple(dict.fromkeys(split for split in (self.val, self.test) if split is not None))


class PrepareSettings(Config):
    """The prior maps, computed once for every sample."""

    name: str = Field("default", pattern=r"^\w[\w.-]*$")
    """Name of the prior set: `<shards>/priors/<name>`."""
    priors: Annotated[
        tuple[Prior, ...] | None,
        BeforeValidator(
            lambda given: None if given == "auto" else given,
            json_schema_input_type=tuple[Prior, ...] | Literal["auto"] | None,
        ),
    ] = None
    """`auto` or None computes the maps that the objectives and poolings of this run need."""

    @model_validator(mode="after")
    def _names_differ(self) -> "PrepareSettings":
        for name, count in Counter(prior.name for prior in self.priors or ()).items():
            if count > 1:
                ways = "keep one, or prepare the other in another set (prepare.name)"
                raise ValueError(f"priors makes the map {name!r} {count} times: {ways}")
        return self

    @property
    def chosen(self) -> tuple[Prior, ...]:
        """The priors; never None in a validated `Settings`."""
        assert self.priors is not None, "Settings replaces auto"
        return self.priors

    def sealed(self) -> "PrepareSettings":
        """A copy with priors bound to the weights in their settings; raises `UserError` with missing weights."""
        sealed = (prior.sealed() if isinstance(prior, BatchExtractor) else prior for prior in self.chosen)
        return self.model_copy(update={"priors": tuple(sealed)})


class NetworkSettings(Config):
    """The common settings of teachers and students."""

    model: Model
    weights: PathText | None = None
    """A safetensors file or PyTorch state dict with the first weights; None means random weights."""
    objectives: tuple[AnyObjective, ...] = ()
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    engine: EngineSettings = EngineSettings()


class TeacherSettings(NetworkSettings):
    """A teacher; a teacher without objectives is never trained."""

    augment: AugmentSettings = AugmentSettings()
    training: TrainingSettings = TrainingSettings(epochs=100)
    during_distill: Literal["frozen", "live", "ema"] = "frozen"
    """`live` also trains it in the same steps with its objectives; with `ema` students follow its averaged weights."""
    seen: tuple[Seen, ...] = ()
    """Classes that its first weights were trained on, or `imagenet-1k`, `-12k`, `-21k`: figures on them are invalid."""

    @model_validator(mode="after")
    def _can_learn(self) -> "TeacherSettings":
        if self.during_distill != "frozen" and not self.objectives:
            raise ValueError(f"during_distill={self.during_distill} needs objectives: add one, or set frozen")
        if self.during_distill == "ema" and self.engine.ema is None:
            raise ValueError("during_distill=ema follows averaged weights: set engine.ema, for example 0.999")
        if not self.objectives and self.weights is None and not self.model.pretrained:
            raise ValueError("a teacher without objectives is never trained: set weights, or add objectives")
        return self


class StudentSettings(NetworkSettings):
    """One student: its network, objectives, optimizer, schedule and engine."""

    objectives: tuple[AnyObjective, ...] = (Supervised(), LogitDistillation())
    baseline: Annotated[
        tuple[Length, ...],
        BeforeValidator(
            lambda given: {True: (1.0,), False: ()}.get(given, given) if isinstance(given, bool) else given,
            json_schema_input_type=bool | tuple[Length, ...],
        ),
    ] = (1.0,)
    """Trainings of the same network on labels alone, in times of the student's steps; `true` is [1], `false` none.

    `plain` has the student's steps, plain cross-entropy, and no recipe for rare classes.
    """


def _without_nulls(value: Any) -> Any:
    """The entries of a mapping that are not null; `key=null` removes an entry."""
    return {key: entry for key, entry in value.items() if entry is not None} if isinstance(value, dict) else value


class DistillSettings(Config):
    """Online distillation: all students use one forward pass of each teacher."""

    students: Annotated[dict[Name, StudentSettings], BeforeValidator(_without_nulls)] = Field(min_length=1)
    augment: AugmentSettings = AugmentSettings()
    training: TrainingSettings = TrainingSettings(epochs=100)
    placement: Literal["together"] = "together"
    """Every rank has all students and its share of the teachers."""


class EvaluateSettings(Config):
    """The measurements on the validation and test splits, the same for teachers, students and baselines."""

    episodes: EpisodeSettings | None = EpisodeSettings()  # None: accuracy on known classes alone
    episodes_while_training: int = Field(400, ge=2)
    probes: ProbeSettings | None = ProbeSettings()


class ExportSettings(Config):
    """The forms in which students are exported."""

    onnx: bool = True
    tolerance: float = Field(1e-3, gt=0)
    """Largest difference between ONNX and PyTorch outputs, relative to the largest output."""


class Settings(Config):
    """All settings of a run; `runs/<name>/settings.yaml` holds them with all defaults."""

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
        """The teachers with objectives."""
        return {name: teacher for name, teacher in self.teachers.items() if teacher.objectives}

    @property
    def trainings(self) -> dict[str, TrainingSettings]:
        """The training settings of every training, by their key."""
        teachers = {f"teachers.{name}.training": teacher.training for name, teacher in self.trained_teachers.items()}
        return {**teachers, "distill.training": self.distill.training}

    @property
    def world_sizes(self) -> tuple[int, ...]:
        """The allowed numbers of workers that share every batch equally, ascending; empty if the launcher chooses."""
        most, trainings = self.launcher.workers or 0, self.trainings.values()
        sizes = range(self.launcher.min_workers or most, most + 1) if most else ()
        return tuple(size for size in sizes if all(training.divides(size) for training in trainings))

    @model_validator(mode="after")
    def _sections_fit(self) -> "Settings":
        self.data.check_splits()
        for key, objective in self.objectives.items():
            self._check_objective(key, objective)
        for key, network in self.networks.items():
            for name, count in Counter(objective.name for objective in network.objectives).items():
                if name is not None and count > 1:
                    raise ValueError(f"{key}.objectives has two objectives with the name {name!r}: rename one")
        uses_table = any("attributes" in objective.needs().targets for objective in self.objectives.values())
        if self.data.attributes is not None and not uses_table:
            unused = f"no objective uses data.attributes={self.data.attributes}"
            raise ValueError(f"{unused}: add an objective {{kind: attributes}}, or remove the table")
        if self.launcher.workers is not None and not self.world_sizes:
            workers = " to ".join(str(each) for each in (self.launcher.min_workers, self.launcher.workers) if each)
            batches = ", ".join(f"{key}.batch_size {training.batch_size}" for key, training in self.trainings.items())
            raise ValueError(f"{workers} workers cannot share {batches} equally, in whole micro-batches: set multiples")
        if self.prepare.priors is None:
            prepare = self.prepare.model_copy(update={"priors": tuple(self._needed_priors())})
            object.__setattr__(self, "prepare", prepare)  # the model is frozen, but still under construction
        if self.data.masks is not None:
            others = tuple(prior for prior in self.prepare.chosen if not isinstance(prior, Mask))
            with_masks = (*others, Mask.of_format(self.data.masks))
            object.__setattr__(self, "prepare", self.prepare.model_copy(update={"priors": with_masks}))
        for key, name in self._maps_used():
            self._check_map(key, name)
        return self

    def _check_objective(self, key: str, objective: Objective) -> None:
        """Checks an objective's teacher, table, views and maps, and that augmentation keeps the colours it reads."""
        needs, section, names = objective.needs(), key.rpartition(".objectives.")[0], list(self.teachers)
        teacher = section.removeprefix("teachers.") if section.startswith("teachers.") else None
        if needs.teacher:
            self._check_teacher(key, objective, among=names[: names.index(teacher)] if teacher else names)
        if "attributes" in needs.targets and self.data.attributes is None:
            raise ValueError(f"{key} learns attributes, but data.attributes is not set: give a .yaml or .csv file")
        if "mask" in needs.targets and self.data.masks is None:
            raise ValueError(f"{key} learns masks, but data.masks is not set: set {{kind: figure_ground}}, for example")
        if "segmentation" in needs.student and "segmentation" not in self._heads(section):
            raise ValueError(f"{key} needs the objective segmentation of the same network: add one, or of weight 0")
        for view in needs.views:
            if view not in self.data.views:
                raise ValueError(f"{key} reads the view {view!r}; data.views has {', '.join(self.data.views)}")
            if self.data.views[view].count < needs.num_views:
                raise ValueError(f"{key} reads {needs.num_views} views or more: set data.views.{view}.count")
        if objective.control == "shuffle" and not needs.maps:
            raise ValueError(f"{key}.control=shuffle exchanges prior maps, and {objective.kind!r} reads none")
        augments = {section: self.teachers[teacher].augment} if teacher else {}
        if teacher is None or self.teachers[teacher].during_distill != "frozen":
            augments["distill"] = self.distill.augment
        for part, augment in augments.items() if needs.own_colours else ():
            if augment.brightness or augment.contrast or augment.saturation:
                changed = f"{key} {needs.own_colours}, and {part}.augment changes colours"
                raise ValueError(f"{changed}: set its brightness, contrast and saturation to 0, or remove the bound")

    def _check_teacher(self, key: str, objective: Objective, *, among: list[str]) -> None:
        """Checks that the objective follows one of the teachers `among`, which has the outputs that it needs."""
        known = ", ".join(among) or "none"
        name = teacher_of(objective) or (among[0] if len(among) == 1 else None)
        if name is None or name not in among:
            raise ValueError(f"{key}.teacher={name!r}: name a teacher that comes before this network ({known})")
        if {"logits", "patch_logits"} & set(objective.needs().teacher) and not self.teachers[name].objectives:
            raise ValueError(f"{key}: {name!r} is never trained and has no logits: follow its features")
        if "segmentation" in objective.needs().teacher and "segmentation" not in self._heads(f"teachers.{name}"):
            raise ValueError(f"{key} follows {name!r}, which has no objective segmentation: add one")

    def _heads(self, network: str) -> set[str]:
        return {head for objective in self.networks[network].objectives for head in objective.needs().heads}

    def _maps_used(self) -> Iterator[tuple[str, str]]:
        for key, network in self.networks.items():
            if isinstance(network.model.pooling, FigureGroundPooling):
                yield f"{key}.model.pooling", network.model.pooling.prior
        augments = {f"teachers.{name}.augment": teacher.augment for name, teacher in self.trained_teachers.items()}
        for key, augment in (augments | {"distill.augment": self.distill.augment}).items():
            yield from ((f"{key}.background", name) for name in augment.maps)
        for key, objective in self.objectives.items():
            yield from ((key, name) for name in objective.needs().maps)

    def _needed_priors(self) -> Iterator[Prior]:
        """Yields a prior with default settings for every stored map that this run uses."""
        used = [(key, name) for key, name in self._maps_used() if name != "mask"]  # the masks are added to any priors
        key_of = {name: key for key, name in used if name not in VIEW_MAPS or key.endswith(FROM_STORE)}
        kinds = {prior.model_fields["kind"].default: prior for prior in BUILT_IN}
        for stored, key in {stored: key for name, key in key_of.items() for stored in _stored(name)}.items():
            kind, _, of = stored.partition("-")
            if kind not in kinds or kind == "learned":
                unknown = f"{key} uses the prior {stored!r}, which no built-in prior computes ({', '.join(kinds)})"
                added = _as_prior(stored) if kind in kinds else "your own as {kind: package.module:Class}"
                raise ValueError(f"{unknown}: add {added} to prepare.priors")
            yield kinds[kind](of=of) if of else kinds[kind]()  # type: ignore[call-arg]

    def _check_map(self, key: str, name: str) -> None:
        """Checks that the map is computed, and that it holds amounts if an objective or a pooling needs amounts."""
        prepared = {prior.name: prior for prior in self.prepare.chosen}
        stored = key.endswith(FROM_STORE)
        if name in derivable(prepared) or (name in VIEW_MAPS and name not in prepared and not stored):
            return
        if name not in prepared:
            missing = ", ".join(_as_prior(stored) for stored in _stored(name) if stored not in prepared)
            known = ", ".join(sorted(prepared)) or "none"
            raise ValueError(f"{key} uses the prior {name!r}; prepare.priors makes {known}: add {missing}, or set auto")
        if name == "mask" and not stored and "mask" not in self.objectives[key].needs().targets:
            raise ValueError(f"{key} would read hidden masks: use the objective segmentation, or the prior expert-mask")
        if prepared[name].nearest:
            raise ValueError(f"{key}: {name!r} holds region labels, not amounts: use another prior, such as 'saliency'")
        if prepared[name].channels > 1 and (stored or name in self.objectives[key].needs().amounts):
            raise ValueError(f"{key}: {name!r} has several channels: use a prior with one, such as 'saliency'")


def _stored(name: str) -> tuple[str, ...]:
    """The stored maps from which a map is derived; for a stored map, its name."""
    return DERIVED[name].needs if name in DERIVED else (name,)


def _as_prior(name: str) -> str:
    """The settings of the prior with this name: `expert-mask` gives {kind: expert, of: mask}."""
    kind, dash, of = name.partition("-")
    return f"{{kind: {kind}{f', of: {of}' if dash else ''}{', model: …' if kind == 'learned' else ''}}}"


def load_settings(path: str | Path, overrides: list[str]) -> Settings:
    """The settings of a YAML file with `key.path=value` overrides; raises `UserError` with key, value and way out."""
    tree = read_yaml_file(Path(path))
    for override in overrides:
        apply_override(tree, override, root=Settings)
    return parse_settings(tree, origin=str(path), overrides=overrides)


def parse_settings(tree: dict[str, Any], *, origin: str, overrides: Sequence[str] = ()) -> Settings:
    """Validates a tree of plain values and returns it as `Settings`; errors name the `origin` and the overrides."""
    try:
        refuse_secrets(tree)
        return Settings.model_validate(tree)
    except RecursionError:
        raise UserError(f"{origin}: a value contains itself, or lists are nested too deeply") from None
    except ValidationError as error:
        raise UserError(f"{origin}: {explain(error, Settings, overrides=overrides)}") from None
