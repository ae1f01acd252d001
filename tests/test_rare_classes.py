"""Rare classes over the whole path, from imbalanced images to figures, report and export; a kill changes nothing."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.data.packing import make_folder
from tests.runs import CONV, Command, all_weights, tiny

COUNTS = {"train/oak": 24, "train/ash": 24, "train/yew": 3, "val/oak": 5, "val/ash": 5, "val/yew": 5}


def settings(folder: Path, *, imbalance: str) -> dict[str, Any]:
    """A run without a teacher: a student with a baseline of each kind."""
    tree = tiny(folder / "run", source=make_folder(folder / "photos", counts=COUNTS))
    tree["data"] |= {"train": "train", "val": "val", "test": None}
    tree["prepare"] = {"priors": []}
    del tree["teachers"]
    student = {"model": CONV, "objectives": [{"kind": "supervised"}], "baseline": [1, "plain"]}
    tree["distill"]["students"] = {"conv": student | {"engine": {"kind": "torch"}}}
    tree["distill"]["training"] |= {"steps": 10, "imbalance": imbalance}
    tree["evaluate"] = {"episodes": None, "probes": None}
    return tree


def test_rare_classes_have_a_recipe_figures_and_a_report(tmp_path: Path) -> None:
    command = Command(settings(tmp_path, imbalance="auto"))
    assert command.wait() == 0, command.output
    chosen = "logit adjusted for rare classes, because the largest class has 24 labels, and the smallest 3"
    assert f"distill: {chosen}" in command.output
    assert f"baseline-conv: {chosen}" in command.output
    assert not re.search(r"baseline-conv\.plain: .* for rare classes", command.output)
    folder = command.folder.path
    report = json.loads((folder / "evaluation.json").read_text())
    student = report["students"]["conv"]
    assert set(report["baselines"]) == {"conv", "conv.plain"}
    assert set(student["classification"]["val"]) >= {"balanced", "few", "medium", "calibration_error"}
    by_class = student["per_class"]["val"]
    assert {name: row["train"] for name, row in by_class.items()} == {"oak": 24, "ash": 24, "yew": 3}
    for name, row in by_class.items():
        low, high = row["ci95"]
        assert low <= row["accuracy"] <= high
        assert len(row["examples"]) == min(3, round(5 * (1 - row["accuracy"])))
        assert all(f"{name}/" in key for key in row["examples"])
    assert sum(map(sum, student["confusion"]["val"]["counts"])) == 15
    page = (folder / "report.html").read_text()
    assert "Confused classes" in page
    assert "conv on labels alone, plain cross-entropy" in page
    assert (folder / "export" / "conv" / "model.safetensors").is_file()
    curves = EventAccumulator(str(folder / "tb" / "distill" / "student-conv")).Reload().Tags()["scalars"]
    assert {"accuracy/val_few", "accuracy/val_medium", "accuracy/val_balanced"} <= set(curves)


def test_a_run_that_is_killed_after_its_weights_came_on_ends_with_the_same_bits(tmp_path: Path) -> None:
    weights = []
    for name, killed in (("whole", False), ("killed", True)):
        command = Command(tree := settings(tmp_path / name, imbalance="deferred"), "--stages", "pack,prepare,distill")
        if killed:
            command.wait_for_step("distill", 9)  # the weights count from step 8 on
            command.kill_all()
            command = Command(tree, "--stages", "pack,prepare,distill")
        assert command.wait() == 0, command.output
        weights.append(all_weights(command.folder))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
