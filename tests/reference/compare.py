"""Runs small reference runs at an old commit and at this checkout, on one machine in one sitting, and compares them.

    python -m tests.reference.compare [--old DIR] [--new DIR] [--runs plain,zero3] [--folder DIR]

`--old` is a checkout of the commit to compare with; without it a git worktree of OLD_COMMIT is made for the time of the
comparison. Each run goes from packed shards to exported students. Compared are the samples, losses, gradient norms and
learning rates of each logged step, every tensor of every trained network and exported model, and the figures of
evaluation.json: bit for bit with 1 and 2 workers, within 1e-6 with 3. The shards and prior maps are compared by bytes.
Prints one line for each run, then what differs; exit code 1 where anything does. About eight minutes on one core.

The settings stand here once, in the keys of this checkout's DESIGN (`teachers`, `objectives`), and are translated for
a checkout whose settings know only `teach` and `losses`. What was renamed on purpose stands in RENAMED.
"""

import argparse
import csv
import json
import math
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file

from tools.make_sample_data import SampleSettings, draw_samples

ROOT = Path(__file__).resolve().parents[2]
OLD_COMMIT = "0b240bf"
TOLERANCE = 1e-6
"""Largest absolute difference with 3 workers, where sums of fp32 numbers are taken in another order."""
SAMPLES = SampleSettings(
    size=48, base_classes=6, val_classes=5, novel_classes=5, largest=24, smallest=8, evaluation=12, unlabelled=12
)
CONV = {"name": "resnet18", "arguments": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "output_stride": 16}}
VIT = {
    "name": "vit_tiny_patch16_224",
    "arguments": {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "pos_drop_rate": 0.1},
}
FIGURE_GROUND = {"pooling": {"kind": "figure_ground", "blank": 0.25}}
EXTRA_WORKERS = {"two_workers": 2, "zero3": 2, "three_workers": 3}

RENAMED: dict[str, list[tuple[str, str]]] = {
    "network": [(r"^teachers/", ""), (r"^teachers-live/teacher", "teacher-live")],
    "tensor": [
        (r"^heads\.prior/", "prior_heads."),
        (r"^heads\.to_teacher/", "to_teacher."),
        (r"^heads\.attributes\.", "attribute_head."),
        (r"^heads\.region/", "region_heads."),
    ],
    "event": [
        (r"(^loss/[^/]+/)attributes\.predict$", r"\1attributes"),
        (r"(^loss/[^/]+/)region_bounds\.fit$", r"\1region.saliency"),
        (r"(^loss/[^/]+/)region_bounds\.(area|compactness|column)$", r"\1region_bounds.saliency.\2"),
    ],
    "figure": [(r"^teachers/teacher/", "teacher/"), (r"^live_teachers/teacher/", "live_teacher/")],
}
"""(pattern in the new checkout, its name in the old): folders of networks, tensors, keys of events.jsonl and of
evaluation.json, each written as a path with slashes."""
NOT_COMPARED = re.compile(r"images_per_s|^device$|speed/")
"""Figures and logged numbers that are times."""


def base(folder: Path, shards: Path) -> dict[str, Any]:
    """The settings that all runs begin with."""
    training = {"steps": 5, "batch_size": 16, "log_every": 1, "checkpoint_every": 3, "precision": "fp32"}
    objectives = [{"kind": "supervised"}, {"kind": "logits"}, {"kind": "features"}, {"kind": "patches"}]
    engine = {"kind": "torch"}
    return {
        "run": {"dir": str(folder), "seed": 3},
        "launcher": {"kind": "local", "workers": 1, "pool_workers": 1, "threads": 1},
        "data": {
            "shards": str(shards),
            "train": "base",
            "val": "val",
            "test": "novel",
            "image_size": 32,
            "samples_per_shard": 48,
            "loader": {"workers": 0},
        },
        "prepare": {"priors": [{"kind": "edge"}, {"kind": "saliency"}]},
        "teachers": {
            "teacher": {
                "model": CONV | FIGURE_GROUND,
                "objectives": [{"kind": "supervised"}],
                "engine": engine | {"ema": 0.9},
                "training": dict(training),
                "during_distill": "frozen",
            }
        },
        "distill": {
            "students": {
                "conv": {"model": CONV | FIGURE_GROUND, "objectives": objectives, "engine": dict(engine)},
                "vit": {"model": VIT, "objectives": objectives, "engine": dict(engine)},
            },
            "training": dict(training),
        },
        "evaluate": {"episodes": {"episodes": 20, "queries": 5}, "episodes_while_training": 10, "probes": None},
        "export": {"onnx": False},
    }


def reference_runs(folder: Path, shards: Path, samples: Path) -> dict[str, dict[str, Any]]:
    """The settings of each run by its name."""
    runs = {name: base(folder / name, shards) for name in NAMES}
    runs["plain"]["distill"]["students"]["conv"]["baseline"] = True
    runs["live_teacher"]["teachers"]["teacher"]["during_distill"] = "live"
    for training in trainings(runs["class_aware"]):
        training["sampling"] = "class_aware"
    runs["class_aware"]["data"]["labels"] = {"kind": "fraction", "fraction": 0.5}
    attributes = [{"kind": "supervised", "balance": "logit_adjusted"}, {"kind": "attributes", "classify": 0.5}]
    runs["attributes"]["data"]["attributes"] = str(samples / "attributes.yaml")
    teacher_of(runs["attributes"])["objectives"] = attributes
    runs["attributes"]["distill"]["students"]["vit"]["objectives"] = attributes
    bounds = [
        {"statistic": "area", "at_least": 0.2, "at_most": 0.3},
        {"statistic": "compactness", "at_least": 0.5},
        {"statistic": "column", "at_most": 0.4, "classes": ["blue-striped-ring"]},
    ]
    teacher_of(runs["region_bounds"])["objectives"] += [{"kind": "region_bounds", "of": "saliency", "bounds": bounds}]
    masked = [{"kind": "masked_prior", "mask_ratio": 0.4, "targets": {"hog": 1.0, "edge": 0.25}}]
    teacher_of(runs["masked_priors"])["objectives"] += masked
    runs["masked_priors"]["distill"]["students"]["vit"]["objectives"] = [{"kind": "supervised"}, *masked]
    for name, micro in {"accumulation": 4, "two_workers": 8, "zero3": 4, "three_workers": 4}.items():
        for training in trainings(runs[name]):
            training["micro_batch_size"] = micro
    for training in trainings(runs["three_workers"]):
        training["batch_size"] = 12
    for name, workers in EXTRA_WORKERS.items():
        runs[name]["launcher"]["workers"] = workers
    for network in (teacher_of(runs["zero3"]), *runs["zero3"]["distill"]["students"].values()):
        network["engine"] |= {"kind": "deepspeed", "zero_stage": 3}
    runs["table_source"]["data"] |= {
        "shards": str(folder / "table-shards"),
        "source": {"kind": "table", "path": str(samples / "table.csv"), "label_column": "label"}
        | {"split_column": "split", "group_column": "group", "mask_column": "mask"},
    }
    return runs


NAMES = (
    *("plain", "live_teacher", "class_aware", "attributes", "region_bounds", "masked_priors", "accumulation"),
    *("two_workers", "zero3", "table_source", "three_workers"),
)


def teacher_of(settings: dict[str, Any]) -> dict[str, Any]:
    """The one teacher of a run."""
    teacher: dict[str, Any] = settings["teachers"]["teacher"]
    return teacher


def trainings(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings of training of the teacher and of the students."""
    return [teacher_of(settings)["training"], settings["distill"]["training"]]


def for_checkout(settings: dict[str, Any], checkout: Path) -> dict[str, Any]:
    """The settings in the keys that this checkout reads."""
    if re.search(r"^    teachers\b", (checkout / "dpkd/settings.py").read_text(), re.MULTILINE):
        return settings
    settings = deepcopy(settings)
    teacher = settings.pop("teachers")["teacher"]
    settings["distill"]["teacher"] = teacher.pop("during_distill")
    settings["teach"] = teacher
    for student in settings["distill"]["students"].values():
        student["losses"] = student.pop("objectives")
    return settings


def write_samples(folder: Path) -> None:
    """The drawn images, and a table of them."""
    draw_samples(folder, settings=SAMPLES, seed=0)
    with (folder / "table.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "label", "split", "group", "mask"])
        for path in sorted(folder.glob("*/*/*.jpg")):
            split, label = path.parts[-3:-1]
            mask, group = path.with_suffix(".mask.png"), f"{split}-{label}-{int(path.stem) // 3}"
            row = [path.relative_to(folder), "" if label == "unlabelled" else label, split, group]
            table.writerow([*row, mask.relative_to(folder) if mask.exists() else ""])


def pretrain(checkout: Path, settings: dict[str, Any], *stages: str) -> float:
    """Runs the stages (all without any) with the code of a checkout; returns the seconds they took."""
    folder = Path(settings["run"]["dir"])
    folder.parent.mkdir(parents=True, exist_ok=True)
    config = folder.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(for_checkout(settings, checkout)))
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(checkout)}
    command = [sys.executable, "-m", "dpkd.pretrain", "--config", str(config)]
    began = time.monotonic()
    with folder.with_suffix(".log").open("w") as log:
        done = subprocess.run(
            command + (["--stages", ",".join(stages)] if stages else []),
            cwd=checkout,
            env=os.environ | threads,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode:
        sys.exit(f"{config.stem} failed in {checkout}:\n{folder.with_suffix('.log').read_text()[-3000:]}")
    return time.monotonic() - began


def renamed(kind: str, name: str) -> str:
    """What the old checkout calls something."""
    for pattern, old in RENAMED[kind]:
        name = re.sub(pattern, old, name)
    return name


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of a tree of plain values by their path with slashes."""
    if not isinstance(tree, dict | list):
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    joined = [flat(child, f"{prefix}/{key}" if prefix else str(key)) for key, child in items]
    return {name: leaf for leaves in joined for name, leaf in leaves.items()}


def logged(run: Path) -> dict[str, float]:
    """Every number of every training line of events.jsonl by stage, step and key."""
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return {
        f"{line['stage']}/{line['step']}/{renamed('event', key)}": number
        for line in lines
        if line["kind"] == "train"
        for key, number in line.items()
        if "/" in key and not NOT_COMPARED.search(key)
    }


def used_samples(run: Path) -> dict[str, int]:
    """The CRC-32 of the samples (int64, in order) of each stage, step and rank."""
    samples = {}
    for path in sorted(run.glob("sample_log/*/*.log")):
        head, *lines = path.read_text().splitlines()
        for step, crc in (line.split() for line in lines):
            samples[f"{path.parent.name}/{step}/{json.loads(head)['rank']}"] = int(crc, 16)
    for path in sorted(run.glob("ledger/*/*.ledger")):  # of the old commit, which kept the numbers themselves
        head_bytes, _, data = path.read_bytes().partition(b"\n")
        rank, at = json.loads(head_bytes)["rank"], 0
        while at < len(data):
            step_number, count = struct.unpack_from("<QI", data, at)
            index = np.frombuffer(data, "<u4", count, at + 12).astype("<i8")
            samples[f"{path.parent.name}/{step_number}/{rank}"] = zlib.crc32(index.tobytes())
            at += 12 + 4 * count
    return samples


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every trained network and of every exported model, by folder and name."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(run.rglob("model.safetensors")):
        network = renamed("network", str(path.parent.relative_to(run)))
        found |= {f"{network}/{renamed('tensor', name)}": tensor for name, tensor in load_file(path).items()}
    return found


def figures(run: Path) -> dict[str, Any]:
    """The figures of evaluation.json."""
    tree = flat(json.loads((run / "evaluation.json").read_text()))
    return {renamed("figure", key): leaf for key, leaf in tree.items() if not NOT_COMPARED.search(key)}


def distance(one: Any, other: Any) -> float:
    """0 where both are equal bit for bit, their largest absolute difference where they are numbers, else infinite."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.shape != other.shape or one.dtype != other.dtype:
            return math.inf
        return 0.0 if torch.equal(one, other) else float((one.double() - other.double()).abs().max())
    if one == other:
        return 0.0
    numbers = isinstance(one, int | float) and isinstance(other, int | float)
    return abs(one - other) or math.inf if numbers and not math.isnan(one - other) else math.inf


def differences(old: Mapping[str, Any], new: Mapping[str, Any], *, tolerance: float) -> list[str]:
    """A line for each name that is missing, and for each value that is further off than the tolerance."""
    lines = [f"{name}: only in the {where}" for where, name in sorted(_alone(old, new))]
    for name in sorted(old.keys() & new.keys()):
        off = distance(old[name], new[name])
        if not off <= tolerance:
            lines.append(f"{name}: off by {off:g}")
    return lines


def _alone(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield from (("old", name) for name in old.keys() - new.keys())
    yield from (("new", name) for name in new.keys() - old.keys())


def compare_shards(old: Path, new: Path) -> list[str]:
    """What differs between the bytes of the shards and of the prior shards."""
    crcs = [
        {str(path.relative_to(shards)): zlib.crc32(path.read_bytes()) for path in shards.rglob("*.tar")}
        for shards in (old, new)
    ]
    return differences(crcs[0], crcs[1], tolerance=0.0)


def compare_runs(old: Path, new: Path, *, tolerance: float) -> dict[str, list[str]]:
    """What differs, by kind."""
    readers: dict[str, Callable[[Path], Mapping[str, Any]]] = {
        "samples": used_samples,
        "losses": logged,
        "weights": tensors,
        "figures": figures,
    }
    found = {}
    for kind, read in readers.items():
        one, other = read(old), read(new)
        assert one, f"{old} has no {kind}"
        found[f"{len(one)} {kind}"] = differences(one, other, tolerance=0.0 if kind == "samples" else tolerance)
    return found


@contextmanager
def old_checkout(given: Path | None, folder: Path) -> Iterator[Path]:
    """The checkout to compare with: the one given, or a worktree of its own."""
    if given is not None:
        yield given.resolve()
        return
    place = folder / "old-checkout"
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--detach", str(place), OLD_COMMIT], check=True, capture_output=True)
    try:
        yield place
    finally:
        subprocess.run([*git, "remove", "--force", str(place)], check=True)


def report(name: str, found: Mapping[str, list[str]], seconds: str) -> bool:
    """Prints what came of one comparison; returns whether all was equal."""
    words = [f"{kind} {f'DIFFER in {len(lines)}' if lines else 'equal'}" for kind, lines in found.items()]
    print(f"{name:<14} {', '.join(words)}; {seconds}", flush=True)
    for kind, lines in found.items():
        for line in lines[:8]:
            print(f"    {kind.split()[-1]}: {line}")
        if len(lines) > 8:
            print(f"    … and {len(lines) - 8} more")
    return not any(found.values())


def compare(checkouts: Mapping[str, Path], folder: Path, *, names: list[str]) -> bool:
    """Runs and compares the named runs, the two checkouts in turn; returns whether all was equal."""
    samples = folder / "samples"
    write_samples(samples)
    runs = {side: reference_runs(folder / side, folder / side / "pack" / "shards", samples) for side in checkouts}
    took = {}
    for side, checkout in checkouts.items():
        pack = base(folder / side / "pack", folder / side / "pack" / "shards")
        pack["data"]["source"] = {"kind": "folder", "path": str(samples)}
        took[side] = pretrain(checkout, pack, "pack", "prepare")
    shards = [folder / side / "pack" / "shards" for side in checkouts]
    equal = report("shards", {"tars": compare_shards(*shards)}, seconds_of(took))
    for name in names:
        for side, checkout in checkouts.items():
            took[side] = pretrain(checkout, runs[side][name])
        exact = runs["new"][name]["launcher"]["workers"] < 3
        found = compare_runs(folder / "old" / name, folder / "new" / name, tolerance=0.0 if exact else TOLERANCE)
        if name == "table_source":
            tables = [folder / side / "table-shards" for side in checkouts]
            found["tars"] = compare_shards(*tables)
        equal &= report(name, found, seconds_of(took))
    return equal


def seconds_of(took: Mapping[str, float]) -> str:
    """How long each side took."""
    return ", ".join(f"{side} {seconds:.0f} s" for side, seconds in took.items())


def main() -> int:
    """Compares two checkouts; 0 where all is equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, metavar="DIR", help=f"checkout to compare with; a worktree of {OLD_COMMIT}")
    parser.add_argument("--new", type=Path, metavar="DIR", default=ROOT, help="checkout to compare; this one")
    parser.add_argument("--runs", metavar="A,B", default=",".join(NAMES), help=f"some of {','.join(NAMES)}")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="keep the runs here; a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder.resolve() if options.folder else Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        with old_checkout(options.old, folder) as old:
            equal = compare({"old": old, "new": options.new.resolve()}, folder, names=options.runs.split(","))
    print("all equal" if equal else "not equal")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
