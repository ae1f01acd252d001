"""Wrong settings stop before work starts, and the message names key, value and way out."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dpkd.errors import UserError
from dpkd.settings import Settings, load_settings, parse_settings

GOOD: dict[str, Any] = {
    "data": {"source": "images"},
    "teachers": {"teacher": {"model": {"name": "resnet10t"}, "objectives": [{"kind": "supervised"}]}},
    "distill": {"students": {"small": {"model": {"name": "resnet10t"}}}},
}


def fault(tree: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        parse_settings(tree, origin="run.yaml")
    return str(caught.value)


def changed(**sections: Any) -> dict[str, Any]:
    tree = copy.deepcopy(GOOD)
    for path, value in sections.items():
        *parents, last = path.split("__")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


AREA = {"statistic": "area", "at_most": 0.5}


def bounded(*bounds: dict[str, Any], of: str = "saliency", **extra: Any) -> dict[str, Any]:
    return changed(teachers__teacher__objectives=[{"kind": "region_bounds", "of": of, "bounds": list(bounds), **extra}])


@pytest.mark.parametrize(
    ("tree", "named"),
    [
        (changed(data__image_sise=64), ["data.image_sise", "did you mean 'image_size'"]),
        (changed(teechers={}), ["teechers", "did you mean 'teachers'"]),
        (changed(teachers__teacher__model={"nmae": "x"}), ["teachers.teacher.model.nmae", "did you mean 'name'"]),
        (
            changed(teachers__teacher__optimizer={"kind": "adamw", "lr": 1}),
            ["teachers.teacher.optimizer.lr", "no such key"],
        ),
        (changed(data__image_size="large"), ["data.image_size", "'large'"]),
        (changed(data__source={"kind": "foldr", "path": "x"}), ["data.source", "'foldr'", "did you mean 'folder'"]),
        (changed(data__source={"path": "x"}), ["data.source", "kind"]),
        (changed(data__source={"kind": "table", "path": "x", "labels": "y"}), ["data.source.labels", "labels_column"]),
        (
            changed(teachers__teacher__objectives=[{"kind": "supervised", "tua": 1}]),
            ["teachers.teacher.objectives.0.tua", "'tau'"],
        ),
        (
            changed(teachers__teacher__training={"steps": 5, "epochs": 2}),
            ["teachers.teacher.training", "either steps or epochs"],
        ),
        (
            changed(teachers__teacher__training={"steps": 5, "batch_size": 100, "micro_batch_size": 48}),
            ["100", "48", "multiple"],
        ),
        (
            changed(launcher__workers=3, teachers__teacher__training={"steps": 5, "batch_size": 128}),
            ["batch_size 128", "3 workers"],
        ),
        (
            changed(
                prepare__priors=[], teachers__teacher__objectives=[{"kind": "masked_prior", "targets": {"edge": 1}}]
            ),
            ["'edge'", "prepare.priors"],
        ),
        (
            changed(
                prepare__priors=[],
                teachers__teacher__model={"name": "resnet10t", "pooling": {"kind": "figure_ground", "prior": "hog"}},
            ),
            ["'hog'", "prepare.priors"],
        ),
        (
            changed(
                teachers__teacher__model={"name": "resnet10t", "pooling": {"kind": "figure_ground", "prior": "depth"}}
            ),
            ["teachers.teacher.model.pooling", "'depth'", "prepare.priors"],
        ),
        (
            changed(
                prepare__priors=[{"kind": "saliency"}],
                teachers__teacher__model={
                    "name": "resnet10t",
                    "pooling": {"kind": "figure_ground", "prior": "foreground"},
                },
            ),
            ["teachers.teacher.model.pooling", "'foreground'", "prepare.priors makes saliency: add {kind: superpixel}"],
        ),
        (
            changed(teachers__teacher__objectives=[{"kind": "masked_prior", "targets": {"learned-depth": 1}}]),
            ["'learned-depth'", "add {kind: learned, of: depth, model: …} to prepare.priors"],
        ),
        (
            changed(prepare__priors=[{"kind": "learned", "of": "depth", "model": {"kind": "onxx", "file": "f"}}]),
            ["prepare.priors.0.model", "'onxx'", "did you mean 'onnx'"],
        ),
        (
            changed(teachers__teacher__objectives=[{"kind": "masked_prior", "targets": {"superpixel": 1}}]),
            ["superpixel", "region labels"],
        ),
        (
            changed(data__splits={"kind": "fraction", "fractions": {"train": 0.9, "valid": 0.1}}),
            ["data.val", "'val'", "train, valid"],
        ),
        (changed(run={"dir": "s3://bucket/run"}), ["run.dir", "'s3://bucket/run'", "a disk that all workers see"]),
        (changed(distill__students={}), ["distill.students"]),
        (
            changed(teachers__teacher__objectives=[{"kind": "supervised"}, {"kind": "attributes"}]),
            ["teachers.teacher.objectives.1", "data.attributes is not set", ".yaml or .csv"],
        ),
        (
            changed(data__attributes="lesions.csv"),
            ["data.attributes=lesions.csv", "add an objective {kind: attributes}"],
        ),
        (
            changed(teachers__teacher__objectives=[{"kind": "supervised", "name": "a"}, {"kind": "hog", "name": "a"}]),
            ["teachers.teacher.objectives.1", "'hog'", "supervised"],
        ),
        (
            changed(teachers__teacher__objectives=[{"kind": "supervised", "name": "a"}] * 2),
            ["teachers.teacher.objectives has two objectives with the name 'a'"],
        ),
        (bounded(), ["teachers.teacher.objectives.0.bounds", "at least 1"]),
        (bounded({"statistic": "area"}), ["teachers.teacher.objectives.0.bounds.0", "at_least, at_most, or both"]),
        (bounded({"statistic": "area", "at_most": 2}), ["bounds.0", "at_most 2 is out of range", "0 and 1"]),
        (bounded({"statistic": "a", "at_least": -200}), ["at_least -200 is out of range", "-128 and 128"]),
        (bounded({"statistic": "row", "at_least": 0.6, "at_most": 0.5}), ["0.6 is above at_most 0.5"]),
        (bounded({"statistic": "aria", "at_most": 1}), ["bounds.0.statistic", "'aria'", "'area'"]),
        (bounded({"statistic": "area", "atmost": 1}), ["bounds.0.atmost", "did you mean 'at_most'"]),
        (bounded(AREA, of="hue"), ["teachers.teacher.objectives.0", "'hue'", "several channels"]),
        (bounded(AREA, of="gabor"), ["teachers.teacher.objectives.0", "'gabor'", "several channels", "saliency"]),
        (bounded(AREA, of="superpixel"), ["teachers.teacher.objectives.0", "region labels"]),
        (
            changed(
                distill__students={"s": {"model": "resnet10t", "objectives": [{"kind": "logits", "teacher": "x"}]}}
            ),
            ["distill.students.s.objectives.0.teacher", "'x'", "teacher"],
        ),
        (
            changed(
                teachers={"public": {"model": "resnet18", "weights": "w.pt"}},
                distill__students={"s": {"model": "resnet10t", "objectives": [{"kind": "logits"}]}},
            ),
            ["distill.students.s.objectives.0", "'public' is never trained", "features"],
        ),
        (changed(teachers={"public": {"model": "resnet18"}}), ["teachers.public", "never trained", "weights"]),
        (changed(teachers__teacher__during_distill="ema"), ["teachers.teacher", "engine.ema"]),
        (
            changed(teachers__teacher__objectives=[{"kind": "supervised", "control": "shuffle"}]),
            ["teachers.teacher.objectives.0.control=shuffle", "reads none"],
        ),
        (
            changed(teachers__teacher__objectives=[{"kind": "no.such.module:Loss"}]),
            ["teachers.teacher.objectives.0", "no.such.module", "package.module:Class"],
        ),
        (bounded(AREA, fit=0), ["teachers.teacher.objectives.0.fit", "greater than 0"]),
        (
            bounded(AREA, {"statistic": "red", "at_least": 0.5}),
            ["teachers.teacher.objectives.0 bounds red", "teachers.teacher.augment changes colours", "saturation to 0"],
        ),
        (changed(distill__students={"a/b": {"model": {"name": "x"}}}), ["distill.students", "a/b"]),
        (
            changed(teachers__teacher__engine={"kind": "torch", "zero_stage": 3}),
            ["teachers.teacher.engine", "zero_stage", "deepspeed"],
        ),
        ({"data": {"source": "x"}, "teachers": GOOD["teachers"]}, ["distill", "missing"]),
        (
            {"data": {"source": "x"}, "distill": GOOD["distill"]},
            ["distill.students.small.objectives.1.teacher", "none"],
        ),
    ],
)
def test_a_fault_names_its_key_and_the_way_out(tree: dict[str, Any], named: list[str]) -> None:
    message = fault(tree)
    for words in ["run.yaml", *named]:
        assert words in message, message


def test_colours_may_be_bound_where_views_keep_them() -> None:
    tree = bounded({"statistic": "lightness", "at_most": 60})
    tree["teachers"]["teacher"]["augment"] = {"brightness": 0, "contrast": 0, "saturation": 0}
    assert parse_settings(tree, origin="x").teachers["teacher"].objectives[0].kind == "region_bounds"
    tree["teachers"]["teacher"]["during_distill"] = "live"
    assert "distill.augment changes colours" in fault(tree)


def test_several_faults_are_told_at_once() -> None:
    message = fault(changed(data__image_sise=64, teachers__teacher__optimizer={"learning_rate": -1}))
    assert "image_sise" in message
    assert "teachers.teacher.optimizer.learning_rate" in message


def test_overrides_reach_into_sections_and_lists(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(changed(teachers__teacher__objectives=[{"kind": "supervised"}])))
    overrides = [
        "teachers.teacher.objectives.0.tau=0.5",
        "teachers.teacher.optimizer.learning_rate=1e-4",
        "run.dir=elsewhere",
        "run.seed=3",
    ]
    read = load_settings(path, overrides)
    assert read.teachers["teacher"].objectives[0].tau == 0.5  # type: ignore[union-attr]
    assert read.teachers["teacher"].optimizer.learning_rate == 1e-4
    assert (read.run.dir, read.run.seed) == ("elsewhere", 3)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("run.seed", "key.path=value"),
        ("teachers.teacher.objectives.7.tau=1", "no position in a list of 1"),
        ("run.seed.deep=1", "plain value"),
        ("run.seed=[", "not valid YAML"),
        ("run.sead=1", "did you mean 'seed'"),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, override: str, named: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(changed(teachers__teacher__objectives=[{"kind": "supervised"}], run__seed=1)))
    with pytest.raises(UserError, match=r"seed|objectives") as caught:
        load_settings(path, [override])
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("override", "other"),
    [
        ("run.sead=1", "run.dir=x"),
        ("distill.training.steps=-1", "distill.training.epochs=2"),
        ("data.splits.kind=clas", "data.image_size=32"),
        ("distill.students.small.model={name: x, poling: y}", "distill.students.other.model=resnet10t"),
        ("data.splits={kind: class, classes: {base: 3, novel: 2}}", "data.val=null"),
    ],
)
def test_a_fault_of_an_override_names_it_and_no_other(tmp_path: Path, override: str, other: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    with pytest.raises(UserError) as caught:
        load_settings(path, [other, override])
    assert str(caught.value).endswith(f"(set on the command line: {override})")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("data: {source: a}\ndata: {source: b}\n", "is given twice"),
        ("data: [", "not valid YAML"),
        ("- 1\n", "list"),
        ("run: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=str(path)) as caught:
        load_settings(path, [])
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("data.source=photos #1", "photos #1"),
        ("data.source=a: b", "a: b"),
        ("data.source=2024", "2024"),
        ("data.source=[x]y.csv", None),
        ("run.dir=yes", "yes"),
        ("run.dir=~/runs/x", str(Path.home() / "runs/x")),
        ("data.source=~/photos", str(Path.home() / "photos")),
        ("data.shards=null", None),
    ],
)
def test_a_key_that_takes_text_takes_it_as_it_is_written(tmp_path: Path, override: str, found: str | None) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    if override == "data.source=[x]y.csv":
        with pytest.raises(UserError, match="not valid YAML"):
            load_settings(path, [override])
        return
    read = load_settings(path, [override])
    assert read.data.source is not None
    values = {"data.source": read.data.source.path, "run.dir": read.run.dir, "data.shards": read.data.shards}
    assert values[override.partition("=")[0]] == found


def test_null_takes_an_entry_out_and_a_model_may_be_its_name(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(changed(distill__students__vit={"model": "vit_tiny_patch16_224"})))
    assert list(load_settings(path, []).distill.students) == ["small", "vit"]
    left = load_settings(path, ["distill.students.small=null", "distill.students.vit.model.pooling.kind=mean"])
    assert list(left.distill.students) == ["vit"]
    assert left.distill.students["vit"].model.name == "vit_tiny_patch16_224"


def test_auto_prepares_what_is_used() -> None:
    pooled = {"name": "resnet10t", "pooling": {"kind": "figure_ground", "prior": "foreground"}}
    objectives = [{"kind": "masked_prior", "targets": {"hog": 1, "edge": 1, "expert-mask": 1}}]
    tree = changed(teachers__teacher__model=pooled, teachers__teacher__objectives=objectives)
    found = parse_settings(tree, origin="x").prepare.chosen
    assert {prior.name for prior in found} == {"saliency", "superpixel", "edge", "expert-mask"}
    assert parse_settings(GOOD, origin="x").prepare.chosen == ()


def test_a_missing_file_is_named() -> None:
    with pytest.raises(UserError, match=r"--config nowhere.yaml"):
        load_settings("nowhere.yaml", [])


@pytest.mark.parametrize(
    ("path", "kind"),
    [("a/b.csv", "table"), ("s3://x/y.parquet", "table"), ("x-{0..3}.tar", "shards"), ("a/b", "folder")],
)
def test_a_plain_path_stands_for_a_source(path: str, kind: str) -> None:
    source = parse_settings(changed(data__source=path), origin="x").data.source
    assert source is not None
    assert source.kind == kind


def test_settings_survive_a_round_trip_through_yaml() -> None:
    first = parse_settings(GOOD, origin="x")
    again = parse_settings(yaml.safe_load(yaml.safe_dump(first.model_dump(mode="json"))), origin="y")
    assert again == first


KEYS = st.sampled_from(["data", "teach", "distill", "run", "model", "students", "kind", "objectives", "steps", "zzz"])
TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda child: st.lists(child, max_size=3) | st.dictionaries(KEYS, child, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(KEYS, TREES, max_size=4))
@settings(max_examples=150, deadline=None)
def test_any_tree_is_taken_or_refused_with_a_message(tree: dict[str, Any]) -> None:
    try:
        assert isinstance(parse_settings(tree, origin="x"), Settings)
    except UserError as error:
        assert str(error).startswith("x: ")  # noqa: PT017 (either outcome is right, the message must be whole)


def test_settings_load_without_heavy_packages() -> None:
    heavy = "('torch', 'timm', 'ray', 'deepspeed', 'numba')"
    code = f"import sys, dpkd.settings; print([name for name in {heavy} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
