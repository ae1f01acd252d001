"""Chooses settings for a source of images: from its labels, splits and image sizes, and from this machine.

    dpkd pretrain photos --students resnet18,vit_tiny_patch16_224 --teacher vit_small_patch14_dinov2.lvd142m

Each setting has a reason. The same call chooses the same settings, so that it continues its run. Every key can also be
given as `key=value`.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import yaml

from dpkd.backends.factory import machine
from dpkd.backends.local_pool import LocalPool
from dpkd.config import apply_override, read_yaml
from dpkd.data.image_headers import BrokenImage, read_header
from dpkd.data.settings import Source as AnySource
from dpkd.data.settings import TableSource
from dpkd.data.shards import MANIFEST_NAME, MASK_EXTENSION, Dataset
from dpkd.data.sources import find
from dpkd.data.sources.folders import ROLES, role_of
from dpkd.data.sources.records import Record, SourceContents, describe_source
from dpkd.data.sources.tables import columns_of
from dpkd.data.splits import assign, group_by_pattern
from dpkd.engine.imbalance import recipe
from dpkd.errors import UserError, did_you_mean
from dpkd.io import storage
from dpkd.launch.settings import LauncherSettings
from dpkd.launch.world_size import NodeResources
from dpkd.settings import DataSettings, Settings, parse_settings

COLUMNS = {
    "path_column": ("path", "file", "filename", "file_name", "filepath", "image", "image_path"),
    "label_column": ("label", "class", "class_name", "target", "category", "diagnosis"),
    "split_column": ("split", "subset"),
    "group_column": ("group", "patient", "patient_id", "subject", "subject_id", "case", "case_id"),
}
"""Usual names of the columns of a table; capitals do not count."""
HOLD_OUT, HOLD_OUT_TWICE = 5, 50
"""Labels of a middle class from which images are held out for val, and from which for test too."""
MEASURED_SIZES = 32
"""Number of images whose size is read."""
CPU_SAMPLES, GPU_SAMPLES = 12_000, 2_000_000
"""Samples of a training, for each CPU core or in all: some ten minutes, or an hour."""
SMALL: dict[str, Any] = {"name": "resnet10t", "arguments": {"channels": [32, 64, 128, 256]}}
TEACHER, STUDENT = {False: "resnet10t", True: "resnet50"}, {False: SMALL, True: {"name": "resnet18"}}
"""The models by whether there is a GPU."""
OF_TEACHER = [
    {"kind": "supervised"},
    {"kind": "rotation", "weight": 0.5, "share": 0.5},
    {"kind": "mixup", "weight": 0.5, "share": 0.5},
]
OF_SEVERAL = [{"kind": "multi_label"}, {"kind": "rotation", "weight": 0.5, "share": 0.5}]
OF_UNLABELLED = [{"kind": "rotation"}, {"kind": "sigreg"}]
"""Objectives of a teacher of the user's images: with a class, several labels, and none."""


class Choice(NamedTuple):
    """The value of a setting, and the reason for it."""

    value: Any
    reason: str


Choices = dict[str, Choice]
"""By key of the settings."""


def chosen_settings(
    source: str | None, overrides: Sequence[str] = (), *, students: str | None = None, teacher: str | None = None
) -> tuple[Settings, str]:
    """The settings for a source with `key=value` overrides, and what was chosen as YAML with reasons.

    `students` are timm models; `teacher` is `auto`, a timm model with published weights, or a file of weights called
    like its model. Raises `UserError` for a source that cannot be read, and for models that are unknown.
    """
    elsewhere = [override.removeprefix("data.source=") for override in overrides if override.startswith("data.source=")]
    if len(paths := [*([] if source is None else [source]), *elsewhere]) > 1:
        raise UserError(f"{' and '.join(paths)}: give one source of images")
    if not paths:
        raise UserError("no images: give a folder or a table of them, as in `dpkd pretrain photos`, or --config FILE")
    named: Any = read_yaml(paths[0]) if paths[0].startswith("{") else {"path": paths[0]}
    early = [override for override in overrides if override.startswith(("data.", "data=", "run.", "run="))]
    none = {"distill.students.none": Choice({"model": "none", "objectives": []}, "the networks are not chosen yet")}

    def so_far() -> Settings:
        return parse_settings(_tree(choices | none, early), origin="chosen settings", overrides=early)

    choices = _of_source(str(named.get("path", "")))
    source_settings = so_far().data.source
    if source_settings is None:
        raise UserError("data={…} replaces data.source: give the keys of data one by one, such as data.image_size=64")
    contents = find(source_settings, pool=LocalPool(1))
    unsized = [record.image.url for record in contents.records if record.image.size < 0]
    if len(missing := [url for url in unsized if storage.local_path(url) is not None]) > len(contents.records) / 2:
        where = f"such as {missing[0]}: paths are relative to the table {source_settings.path}"
        raise UserError(f"{len(missing)} of {len(contents.records)} files do not exist, {where}")
    choices |= _of_splits(contents.records, source_settings)
    run, data = (settings := so_far()).run, settings.data
    _refuse_changed_images(contents, source_settings, data.shards or f"{run.from_ or run.dir}/shards")
    records = group_by_pattern(contents.records, data.group_pattern)[0]
    choices |= _of_networks(records, data, seed=run.seed, students=students, teacher=teacher)
    tree = _tree(choices, overrides)
    settings = parse_settings(deepcopy(tree), origin="chosen settings", overrides=overrides)
    return settings, "\n".join(_with_reasons(tree, choices, [text.partition("=")[0] for text in overrides]))


def _tree(choices: Choices, overrides: Sequence[str]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, choice in choices.items():
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = deepcopy(choice.value)
    for override in overrides:
        apply_override(tree, override, root=Settings)
    return tree


def _with_reasons(
    tree: Mapping[str, Any], choices: Choices, given: Sequence[str], parents: tuple[str, ...] = ()
) -> list[str]:
    """The tree as YAML, with the reason for each choice, or what of it is `given` by overrides of these keys."""
    lines, indent = list[str](), "  " * len(parents)
    for name, value in tree.items():
        key = ".".join(path := (*parents, name))
        if isinstance(value, dict) and key not in choices and key not in given:
            lines += [f"{indent}{name}:", *_with_reasons(value, choices, given, path)]
            continue
        below = [other.removeprefix(f"{key}.") for other in given if other.startswith(f"{key}.")]
        reason = f"{below[-1]} is given" if below else "given" if key in given else choices[key].reason
        flow = yaml.safe_dump({name: value}, default_flow_style=True, sort_keys=False, width=math.inf).strip()[1:-1]
        line, comment = indent + flow, f"# {' '.join(reason.split())}"
        lines += [f"{line:<44}  {comment}"] if len(line) < 60 else [indent + comment, line]
    return lines


def _refuse_changed_images(contents: SourceContents, source: AnySource, shards: str) -> None:
    """Raises `UserError` if the images were packed, and are not those of the source any more."""
    if storage.exists(storage.join(shards, MANIFEST_NAME)):
        packed = Dataset.open(shards).manifest.made_from.get("data.source")
        if packed is not None and packed != (here := describe_source(source, contents.records)):
            raise UserError(
                f"{source.path} has changed since {shards} was packed ({packed}; now {here}): set another run.dir, or "
                "go on with the packed images by --config and the chosen.yaml of the run"
            )


def _of_source(path: str) -> Choices:
    """The run folder, and the source with the columns of a table."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(path).stem).strip("-") or "images"
    choices = {"run.dir": Choice(f"runs/{name}", "named after the source")}
    if not re.search(r"\.(csv|tsv|jsonl|parquet)(\?.*)?$", path):
        return choices | {"data.source": Choice(path, "given")}
    columns = {column.lower(): column for column in columns_of(TableSource(path=path)) if column}
    found = {use: next((columns[name] for name in names if name in columns), None) for use, names in COLUMNS.items()}
    by_name = {
        f"data.source.{use}": Choice(column, f"by its name, among {', '.join(columns.values())}")
        for use, column in found.items()
        if column is not None
    }
    return (
        choices
        | {"data.source.kind": Choice("table", "a row is an image"), "data.source.path": Choice(path, "given")}
        | by_name
    )


def _of_splits(records: Sequence[Record], source: AnySource) -> Choices:
    """The splits: those of the source, or images held out by class where enough are labelled."""
    given = sorted({record.split for record in records if record.split is not None})
    if given:
        by_role = {role: next((name for name in given if role_of(name) == role), None) for role in ROLES}
        if by_role["train"] is None:
            raise UserError(f"the source has the splits {', '.join(given)}: name the one for training, data.train=NAME")
        reasons = dict.fromkeys(given, "a split of the source")
        return {
            f"data.{role}": Choice(name, reasons.get(name or "", "none in the source"))
            for role, name in by_role.items()
        }
    labels = Counter(name for record in records for name in record.label_names)
    per_class = int(median(labels.values())) if labels else 0
    count = f"{per_class} labels in the median class"
    if len(labels) == 1:
        raise UserError(
            f"all labelled images are of one class, {next(iter(labels))}: add a second class, or put them into a "
            "folder `unlabelled` to learn without labels"
        )
    if per_class < HOLD_OUT:
        few = f"{count} of {len(labels)} are too few to hold some out" if labels else "no image has a label"
        if isinstance(source, TableSource) and source.label_column is None and not source.multi_label:
            few = f"no column is called {', '.join(COLUMNS['label_column'])} (else data.source.label_column=NAME)"
        return {f"data.{role}": Choice(None, f"{few}: nothing is measured") for role in ("val", "test")}
    whole = " and never cut a group" if any(record.group is not None for record in records) else ""
    reason = f"{len(labels)} classes, {count}: split by class{whole}; images without a label train"
    if per_class < HOLD_OUT_TWICE:
        fractions: dict[str, float] = {"train": 0.8, "val": 0.2}
        test = Choice(None, "too few labels to hold out twice: the figures are those of val")
    else:
        fractions, test = {"train": 0.8, "val": 0.1, "test": 0.1}, Choice("test", "for the figures of the report")
    splits = {"data.splits": Choice({"kind": "fraction", "fractions": fractions}, reason)}
    return splits | {"data.val": Choice("val", "for choices"), "data.test": test}


def _of_networks(
    records: Sequence[Record], data: DataSettings, *, seed: int, students: str | None, teacher: str | None
) -> Choices:
    """Image size, networks, objectives and lengths, for the images of training and this machine."""
    splits = assign(records, data.splits, seed=seed, train=data.train, listed={}).splits
    counts, trained = defaultdict[str | None, Counter[str | None]](Counter), list[Record]()
    for record, split in zip(records, splits, strict=True):
        counts[split][record.class_name] += 1
        trained += [record] if split == data.train else []
    if not trained:
        known = ", ".join(sorted({split for split in splits if split is not None}))
        raise UserError(f"data.train={data.train!r} has no image; the splits are {known}")
    num_labelled = sum(record.labelled for record in trained)
    several = any(record.labels is not None for record in trained)
    del counts[data.train][None]
    found = machine(LauncherSettings())
    number, kind = (found.gpus, "GPU") if found.gpus else (found.cpus, "CPU core")
    here = f"{number} {kind}{'s' if number > 1 else ''}"
    own = teacher in (None, "auto")
    taught, learned = _objectives(labelled=num_labelled > 0, several=several, own=own)
    guide: dict[str, Any] = {"model": {"name": TEACHER[found.gpus > 0]}} if own else _with_weights(str(teacher))
    asked = [name.strip() for name in (students or "").split(",") if name.strip()]
    models = [{"name": name} for name in asked] or [STUDENT[found.gpus > 0]]
    if twice := [name for name, count in Counter(model["name"] for model in models).items() if count > 1]:
        raise UserError(
            f"--students has {twice[0]} twice: name it once, or give students of your own in a --config FILE"
        )
    length = _length(len(trained), num_labelled, counts[data.train], found, here=here)
    names = [model["name"] for model in (guide["model"], *models)]
    choices = {
        "data.image_size": _image_size(trained, names, most=224 if found.gpus else 96),
        "data.loader.workers": Choice(min(8, max(1, found.cpus // max(1, found.gpus) - 1)), f"for {here}"),
    }
    if own:
        why = f"larger than the students, for {here}; a map shows it the figure"
        if masks := sum(MASK_EXTENSION in record.given for record in trained):
            why += f". {masks} masks are not used: pooling.prior=expert-mask takes them for the map"
        choices["teachers.teacher.model"] = Choice(guide["model"] | {"pooling": {"kind": "figure_ground"}}, why)
        if not num_labelled:
            choices["data.views"] = Choice({"global": {"count": 2}}, "sigreg compares two views of each image")
        background = Choice({"background": {"share": 0.5}}, "figures on the ground of other images")
        parts = {"objectives": taught, "augment": background, "training": length}
        choices |= {f"teachers.teacher.{part}": choice for part, choice in parts.items()}
    else:
        choices |= {f"teachers.teacher.{key}": Choice(value, "never trained") for key, value in guide.items()}
    for model in models:
        key = f"distill.students.{re.sub(r'[^A-Za-z0-9_-]+', '-', model['name'])}"
        choices[f"{key}.model"] = Choice(model, "given" if asked else f"smaller than the teacher, for {here}")
        choices[f"{key}.objectives"] = learned
        if not num_labelled:
            choices[f"{key}.baseline"] = Choice([], "there are no labels to compare with")
    if several:
        each = Choice(None, "the ranking of images by each label is measured")
        return choices | {"distill.training": length, "evaluate.episodes": each, "evaluate.probes": each}
    return choices | {"distill.training": length} | _of_evaluation(data, counts)


def _objectives(*, labelled: bool, several: bool, own: bool) -> tuple[Choice, Choice]:
    """The objectives of a teacher of the user's images, and of students."""
    learned = [{"kind": "features", "weight": 2.0}, {"kind": "relations", "weight": 2.0}]
    if not labelled:
        return Choice(OF_UNLABELLED, "these need no label"), Choice(learned, "follows the teacher")
    if own:  # a teacher that is never trained has no logits of these classes
        logits = {"kind": "logits", "weight": 4.0, "temperature": 2.0}
        learned.insert(0, {"kind": "multi_label_logits", "weight": 4.0} if several else logits)
    learned.insert(0, {"kind": "multi_label" if several else "supervised", "weight": 0.5})
    taught = Choice(OF_TEACHER, "turned and mixed images beside the labels")
    if several:
        taught = Choice(OF_SEVERAL, "an image may have several labels; turned images beside them")
    return taught, Choice(learned, "follows the teacher and the labels")


def _length(
    num_images: int, num_labelled: int, labels: Counter[str | None], resources: NodeResources, *, here: str
) -> Choice:
    """Epochs and batches: some ten minutes on CPUs, at least 30 epochs on GPUs; and the recipe for rare classes."""
    if resources.gpus:
        epochs, most = min(300, max(30, round(GPU_SAMPLES / num_images))), 256
    else:
        epochs, most = min(100, max(3, round(CPU_SAMPLES * resources.cpus / num_images))), 64
    ranks = max(1, resources.gpus)
    per_rank = 2 ** int(math.log2(max(2, min(most, num_images // 2 // ranks))))
    training: dict[str, Any] = {"epochs": epochs, "batch_size": per_rank * ranks, "log_every": 20}
    why = f"for {num_images:,} images and {here}; longer is better"
    if 0 < num_labelled < num_images / 2:
        training["labelled_share"] = 0.5  # else few batches would teach a class
    if labels:
        training["imbalance"] = "auto"
        why += f"; {recipe('auto', 'auto', np.array(list(labels.values())))}"
    return Choice(training, why)


def _of_evaluation(data: DataSettings, counts: Mapping[str | None, Counter[str | None]]) -> Choices:
    """Accuracy on known classes where training knows them, else episodes that fit the smallest split."""
    if not data.evaluated_splits:
        return {}
    classes = {split: [name for name in counts[split] if name is not None] for split in data.evaluated_splits}
    classes = {split: names for split, names in classes.items() if names}  # on the others nothing is measured
    if all({*names} <= counts[data.train].keys() for names in classes.values()):
        known = "training knows all classes: accuracy on them is measured"
        return {"evaluate.episodes": Choice(None, known), "evaluate.probes": Choice(None, "by the classifier itself")}
    way = min(5, *map(len, classes.values()))
    # a twentieth may turn out to be damaged
    fewest = min(sorted(counts[split][name] for name in names)[-way] * 19 // 20 for split, names in classes.items())
    shots = [shot for shot in (1, 5) if fewest >= 3 * shot] or [1]
    episodes = {"way": way, "shots": shots, "queries": max(1, min(15, fewest - shots[-1]))}
    return {"evaluate.episodes": Choice(episodes, f"new classes with {fewest} images or more")}


def _image_size(trained: Sequence[Record], names: Sequence[str], *, most: int) -> Choice:
    """The shorter side of an image in the middle, at most `most`, in whole patches of all networks."""
    sides = []
    for record in trained[:: max(1, len(trained) // MEASURED_SIZES)]:
        with suppress(BrokenImage):
            header = read_header(record.image.read())
            sides.append(min(header.width, header.height))
    side = int(median(sides)) if sides else most
    patches = [int(found[1]) for name in names if (found := re.search(r"_patch(\d+)", name))]
    step = math.lcm(*patches) if patches else 32
    size = max(step, round(min(side, most) / step) * step)
    seen = f"shorter sides are about {side} px" if sides else "no image of those looked at can be read"
    return Choice(size, seen + (f", patches {step}" if patches else ""))


def _with_weights(teacher: str) -> dict[str, Any]:
    """The settings of a teacher that is never trained: published weights of timm, or a file called like its model."""
    import timm  # noqa: PLC0415  loads torch, which other choices need not

    path = Path(teacher).expanduser()
    if not path.is_file():
        with suppress(RuntimeError):  # timm has the model, and no weights by that tag
            if timm.is_model(teacher) and timm.get_pretrained_cfg(teacher):
                return {"model": {"name": teacher, "pretrained": True}}
        near = did_you_mean(teacher, timm.list_models(pretrained=True))
        raise UserError(f"--teacher {teacher}: neither a timm model with weights{near} nor a file of weights")
    if not timm.is_model(path.stem):
        raise UserError(
            f"--teacher {teacher}: {path.stem!r} is no timm model, so its architecture is not known: call the file "
            "like its model, such as vit_small_patch14_dinov2.safetensors"
        )
    return {"model": {"name": path.stem}, "weights": str(path)}
