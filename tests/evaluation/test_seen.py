"""Classes of public data sets and of a list, found among the classes of a data set."""

from pathlib import Path

import pytest

from dpkd.errors import UserError
from dpkd.evaluation.seen import seen_among
from dpkd.stages.evaluate import seen_by
from tests.runs import settings_of, tiny


def test_classes_are_found_by_name_synset_and_word() -> None:
    classes = ["n01443537", "goldfish", "Great_White_Shark", "nucleus", "square"]
    assert seen_among(classes, ["imagenet-1k"]) == ["Great_White_Shark", "goldfish", "n01443537"]
    assert seen_among(classes, ["Square"]) == ["square"]
    assert seen_among(classes, ["imagenet-1k", "nucleus"]) == ["Great_White_Shark", "goldfish", "n01443537", "nucleus"]
    assert seen_among(["vertebrate"], ["imagenet-1k"]) == []
    assert seen_among(["vertebrate"], ["imagenet-21k"]) == ["vertebrate"]


def test_what_a_teacher_has_seen_counts_for_those_that_follow_it(tmp_path: Path) -> None:
    tree = tiny(tmp_path / "run", source=tmp_path)
    tree["teachers"] = {
        "public": {"model": "resnet18", "weights": "weights.safetensors", "seen": ["imagenet-1k", "square"]},
        "own": tree["teachers"]["teacher"],
    }
    students = tree["distill"]["students"]
    for name, teacher in (("conv", "own"), ("vit", "public")):
        students[name]["objectives"] = [{"kind": "features", "teacher": teacher}]
    seen = seen_by(settings_of(tree))
    assert seen == {
        "teachers.public": {"imagenet-1k", "square"},
        "teachers.own": set(),
        "students.conv": set(),
        "students.vit": {"imagenet-1k", "square"},
    }
    tree["teachers"]["own"]["objectives"].append({"kind": "features", "teacher": "public"})
    assert seen_by(settings_of(tree))["students.conv"] == {"imagenet-1k", "square"}


def test_an_unknown_public_data_set_is_refused(tmp_path: Path) -> None:
    tree = tiny(tmp_path / "run", source=tmp_path)
    tree["teachers"]["teacher"]["seen"] = ["imagenet"]
    with pytest.raises(UserError, match=r"teachers\.teacher\.seen.*'imagenet' is no data set that dpkd knows"):
        settings_of(tree)
