"""The rows of a ledger: configurations derived from a user's settings, each as the overrides that make it.

all                       the user's settings
labels alone              no teacher, no prior; the students learn labels alone, as their baselines do
labels + tricks           the same, with the objectives that need neither a teacher nor a map (rotation, mixup)
teacher without priors    every use of a prior map removed
random maps               every use takes the map of another image
without U, only U         all uses of a map but one, and one alone
all at 5 % of labels, labels alone at 5 % of labels
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import yaml

from dpkd.config import apply_override
from dpkd.errors import UserError
from dpkd.models.settings import FigureGroundPooling
from dpkd.objectives.base import Objective, named
from dpkd.settings import Settings, TeacherSettings, parse_settings
from dpkd.stages.baselines import labels_alone

ALL, LABELS, TRICKS, TRICKS_ON_ALL = "all", "labels alone", "labels + tricks", "labels + tricks on all images"
PLAIN, RANDOM = "teacher without priors", "random maps"
ALL_LABELLED = "distill.training.labelled_share=1"


def prior_uses(settings: Settings) -> dict[str, list[str]]:
    """The keys that use prior maps by the name of the use: `teacher.pooling`, `students.patches`.

    Students share a use of one name, because they are trained together.
    """
    uses: dict[str, list[str]] = defaultdict(list)
    for key, network in settings.networks.items():
        owner = key.removeprefix("teachers.") if isinstance(network, TeacherSettings) else "students"
        if isinstance(network.model.pooling, FigureGroundPooling):
            uses[f"{owner}.pooling"].append(f"{key}.model.pooling")
        if isinstance(network, TeacherSettings) and network.objectives and network.augment.background is not None:
            uses[f"{owner}.background"].append(f"{key}.augment.background")
        for position, (name, objective) in enumerate(named(network.objectives).items()):
            if objective.needs().priors:
                uses[f"{owner}.{name}"].append(f"{key}.objectives.{position}")
    if settings.distill.augment.background is not None:
        uses["students.background"].append("distill.augment.background")
    return dict(uses)


def rows_of(settings: Settings, *, shares: Sequence[float] = ()) -> dict[str, list[str]]:
    """The overrides of each row by its name, those that tell most first; `shares` are shares of labels."""
    uses, tricks, alone = prior_uses(settings), dict[str, Objective](), _without_teachers(settings, tricks=())
    for objective in settings.objectives.values():
        if (
            objective.kind not in ("supervised", "segmentation")
            and not objective.needs().priors
            and not objective.needs().teacher
        ):
            tricks.setdefault(objective.kind, objective)
    table: dict[str, list[str]] = {ALL: [], LABELS: alone}
    if tricks:
        table[TRICKS] = _without_teachers(settings, tricks=tricks.values())
        if settings.data.labels.kind != "all" or settings.distill.training.labelled_share is not None:
            table[TRICKS_ON_ALL] = [each for each in table[TRICKS] if each != ALL_LABELLED]
    if uses:
        table[PLAIN] = without(settings, uses)
        table[RANDOM] = [f"{key}.control=shuffle" for keys in uses.values() for key in keys]
    table |= {f"without {name}": without(settings, {name}) for name in uses}
    table |= {f"only {name}": without(settings, uses.keys() - {name}) for name in uses}
    for share in shares:
        labels = override("data.labels", {"kind": "fraction", "fraction": share})
        table |= {ALL + at(share): [labels], LABELS + at(share): [*alone, labels]}
    return table


def at(share: float) -> str:
    """The end of the name of a row with this share of labels."""
    return f" at {100 * share:g} % of labels"


def _without_teachers(settings: Settings, *, tricks: Collection[Objective]) -> list[str]:
    plain = [each for each in without(settings, prior_uses(settings)) if not each.startswith("teachers.")]
    if settings.data.attributes is not None and not any("attributes" in each.needs().targets for each in tricks):
        plain.append("data.attributes=null")
    for name, student in settings.distill.students.items():
        plain.append(_objectives(f"distill.students.{name}", (*labels_alone(settings, student), *tricks)))
    return [override("teachers", {}), ALL_LABELLED, *plain]


def without(settings: Settings, names: Collection[str]) -> list[str]:
    """The overrides that remove these uses: an objective keeps what it is without maps, or goes."""
    keys = {key for name, keys in prior_uses(settings).items() if name in names for key in keys}
    overrides = [override(key, {"kind": "mean"}) for key in sorted(keys) if key.endswith(".pooling")]
    overrides += [override(key, None) for key in sorted(keys) if key.endswith(".background")]
    for owner, network in settings.networks.items():
        places = {f"{owner}.objectives.{position}": each for position, each in enumerate(network.objectives)}
        if keys & places.keys():
            left = [each.without_maps() if place in keys else each for place, each in places.items()]
            overrides.append(_objectives(owner, [each for each in left if each is not None]))
    return overrides


def _objectives(owner: str, objectives: Iterable[Objective]) -> str:
    trees = [{"kind": each.kind, **each.model_dump(mode="json", exclude_defaults=True)} for each in objectives]
    return override(f"{owner}.objectives", trees)


def override(key: str, value: Any) -> str:
    """`key=value` for the command line."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1_000_000)
    return f"{key}={text.removesuffix('...' + chr(10)).strip()}"


def with_overrides(settings: Settings, overrides: Iterable[str], *, origin: str) -> Settings:
    """The settings with these overrides; raises `UserError`, also if a student would learn nothing."""
    tree = settings.model_dump(mode="json")
    for each in overrides:
        apply_override(tree, each, root=Settings)
    changed = parse_settings(tree, origin=origin)
    for name, student in changed.distill.students.items():
        if not student.objectives:
            raise UserError(f"{origin}: distill.students.{name} would learn nothing: all its objectives read maps")
    return changed
