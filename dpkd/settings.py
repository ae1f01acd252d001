"""The settings of a run: composed of the parts, checked across them before work starts. Loads no heavy package."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError, model_validator

from dpkd.data.settings import ClassSplits, FractionSplits, GivenSplits
from dpkd.errors import UserError
from dpkd.models.settings import FigureGroundPooling, ModelSettings
from dpkd.objectives.settings import StudentObjective, TeacherObjective, maps_taken
from dpkd.priors.derived import DERIVED, derivable
from dpkd.section import Section
from dpkd.settings_errors import explain
from dpkd.stages.settings import (
    DataSettings,
    DistillSettings,
    EvaluateSettings,
    ExportSettings,
    LauncherSettings,
    PrepareSettings,
    RunSettings,
    TeachSettings,
)
from dpkd.train.settings import TrainingSettings


class Settings(Section):
    """Everything a run was asked for; `runs/<name>/settings.yaml` holds it resolved."""

    run: RunSettings = RunSettings()
    launcher: LauncherSettings = LauncherSettings()
    data: DataSettings
    prepare: PrepareSettings = PrepareSettings()
    teach: TeachSettings
    distill: DistillSettings
    evaluate: EvaluateSettings = EvaluateSettings()
    export: ExportSettings = ExportSettings()

    @model_validator(mode="after")
    def _parts_fit(self) -> "Settings":
        _priors_are_prepared(self)
        for stage, training in (("teach", self.teach.training), ("distill", self.distill.training)):
            _batch_divides(f"{stage}.training", training, workers=self.launcher.workers)
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
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{origin}: {explain(error, Settings)}") from None


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice, which plain YAML would settle in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: cannot be read ({error}); give the path of a YAML file") from None
    try:
        tree = yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 - a SafeLoader
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
        value = yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 - a SafeLoader
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
    if not name.isdigit() or int(name) >= len(items):
        raise UserError(f"{override!r}: {name!r} is no position in a list of {len(items)}; they count from 0")
    return int(name)


def _priors_are_prepared(settings: Settings) -> None:
    prepared = {prior.name: prior for prior in settings.prepare.priors}
    derived = derivable(prepared)
    for key, name in _priors_used(settings):
        if name in derived:
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


def _batch_divides(key: str, training: TrainingSettings, *, workers: int | None) -> None:
    micro, batch = training.micro_batch_size, training.batch_size
    if micro is not None and batch % micro:
        raise ValueError(f"{key}.batch_size {batch} is no multiple of {key}.micro_batch_size {micro}")
    share = (micro or 1) * (workers or 1)
    if batch % share:
        raise ValueError(
            f"{key}.batch_size {batch} does not divide among {workers} workers"
            f"{f' in micro-batches of {micro}' if micro else ''}; take a multiple of {share}"
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
