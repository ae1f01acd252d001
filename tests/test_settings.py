"""Wrong settings stop before work starts, and the message names key, value and way out."""

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
    "teach": {"model": {"name": "resnet10t"}},
    "distill": {"students": {"small": {"model": {"name": "resnet10t"}}}},
}


def fault(tree: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        parse_settings(tree, origin="run.yaml")
    return str(caught.value)


def changed(**sections: Any) -> dict[str, Any]:
    tree = {name: dict(section) for name, section in GOOD.items()}
    for path, value in sections.items():
        *parents, last = path.split("__")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


AREA = {"statistic": "area", "at_most": 0.5}


def bounded(*bounds: dict[str, Any], of: str = "saliency", **extra: Any) -> dict[str, Any]:
    return changed(teach__objectives=[{"kind": "region_bounds", "of": of, "bounds": list(bounds), **extra}])


@pytest.mark.parametrize(
    ("tree", "named"),
    [
        (changed(data__image_sise=64), ["data.image_sise", "did you mean 'image_size'"]),
        (changed(teech={}), ["teech", "did you mean 'teach'"]),
        (changed(teach__optimizer={"kind": "adamw", "lr": 1}), ["teach.optimizer.lr", "no such key"]),
        (changed(data__image_size="large"), ["data.image_size", "'large'"]),
        (changed(data__source={"kind": "foldr", "path": "x"}), ["data.source", "'foldr'", "did you mean 'folder'"]),
        (changed(data__source={"path": "x"}), ["data.source", "kind"]),
        (changed(data__source={"kind": "table", "path": "x", "labels": "y"}), ["data.source.labels", "label_column"]),
        (changed(teach__objectives=[{"kind": "supervised", "tua": 1}]), ["teach.objectives.0.tua", "'tau'"]),
        (changed(teach__training={"steps": 5, "epochs": 2}), ["teach.training", "either steps or epochs"]),
        (changed(teach__training={"steps": 5, "batch_size": 100, "micro_batch_size": 48}), ["100", "48", "multiple"]),
        (
            changed(launcher__workers=3, teach__training={"steps": 5, "batch_size": 128}),
            ["batch_size 128", "3 workers"],
        ),
        (
            changed(prepare__priors=[], teach__objectives=[{"kind": "masked_prior", "targets": {"edge": 1}}]),
            ["'edge'", "prepare.priors"],
        ),
        (
            changed(
                prepare__priors=[],
                teach__model={"name": "resnet10t", "pooling": {"kind": "figure_ground", "prior": "hog"}},
            ),
            ["'hog'", "prepare.priors"],
        ),
        (
            changed(teach__model={"name": "resnet10t", "pooling": {"kind": "figure_ground", "prior": "depth"}}),
            ["teach.model.pooling", "'depth'", "prepare.priors"],
        ),
        (
            changed(
                prepare__priors=[{"kind": "saliency"}],
                teach__model={"name": "resnet10t", "pooling": {"kind": "figure_ground", "prior": "foreground"}},
            ),
            ["teach.model.pooling", "'foreground'", "add {kind: superpixel} to prepare.priors"],
        ),
        (
            changed(teach__objectives=[{"kind": "masked_prior", "targets": {"learned-depth": 1}}]),
            ["'learned-depth'", "add {kind: learned, of: depth, model: …} to prepare.priors"],
        ),
        (
            changed(prepare__priors=[{"kind": "learned", "of": "depth", "model": {"kind": "onxx", "file": "f"}}]),
            ["prepare.priors.0.model", "'onxx'", "did you mean 'onnx'"],
        ),
        (
            changed(teach__objectives=[{"kind": "masked_prior", "targets": {"superpixel": 1}}]),
            ["superpixel", "region labels"],
        ),
        (
            changed(data__splits={"kind": "fraction", "fractions": {"train": 0.9, "valid": 0.1}}),
            ["data.val", "'val'", "train, valid"],
        ),
        (changed(run={"dir": "s3://bucket/run"}), ["run.dir", "'s3://bucket/run'", "a disk that all workers see"]),
        (changed(distill__students={}), ["distill.students"]),
        (
            changed(teach__objectives=[{"kind": "supervised"}, {"kind": "attributes"}]),
            ["teach.objectives.1", "data.attributes names no table", ".yaml or .csv"],
        ),
        (changed(data__attributes="lesions.csv"), ["data.attributes=lesions.csv", "add {kind: attributes}"]),
        (
            changed(data__attributes="x.csv", teach__objectives=[{"kind": "attributes"}, {"kind": "attributes"}]),
            ["teach.objectives", "asks twice for attributes"],
        ),
        (bounded(), ["teach.objectives.0.bounds", "at least 1"]),
        (bounded({"statistic": "area"}), ["teach.objectives.0.bounds.0", "at_least, at_most, or both"]),
        (bounded({"statistic": "area", "at_most": 2}), ["bounds.0", "at_most 2 is out of range", "0 and 1"]),
        (bounded({"statistic": "a", "at_least": -200}), ["at_least -200 is out of range", "-128 and 128"]),
        (bounded({"statistic": "row", "at_least": 0.6, "at_most": 0.5}), ["0.6 is above at_most 0.5"]),
        (bounded({"statistic": "aria", "at_most": 1}), ["bounds.0.statistic", "'aria'", "'area'"]),
        (bounded({"statistic": "area", "atmost": 1}), ["bounds.0.atmost", "did you mean 'at_most'"]),
        (bounded(AREA, of="hue"), ["teach.objectives.0", "'hue'", "add {kind: hue} to prepare.priors"]),
        (bounded(AREA, of="gabor"), ["teach.objectives.0.of='gabor'", "no map of one amount", "saliency"]),
        (bounded(AREA, of="superpixel"), ["teach.objectives.0", "region labels"]),
        (bounded(AREA, fit=0), ["teach.objectives.0.fit", "greater than 0"]),
        (
            bounded(AREA, {"statistic": "red", "at_least": 0.5}),
            ["teach.objectives.0 bounds red", "teach.augment changes colours", "saturation to 0"],
        ),
        (
            changed(teach__objectives=[{"kind": "region_bounds", "of": "saliency", "bounds": [AREA]}] * 2),
            ["teach.objectives", "the region of one map"],
        ),
        (changed(distill__students={"a/b": {"model": {"name": "x"}}}), ["distill.students", "a/b"]),
        (changed(teach__engine={"kind": "torch", "zero_stage": 3}), ["teach.engine", "zero_stage", "deepspeed"]),
        ({"data": {"source": "x"}, "distill": GOOD["distill"]}, ["teach", "missing"]),
    ],
)
def test_a_fault_names_its_key_and_the_way_out(tree: dict[str, Any], named: list[str]) -> None:
    message = fault(tree)
    for words in ["run.yaml", *named]:
        assert words in message, message


def test_colours_may_be_bound_where_views_keep_them() -> None:
    tree = bounded({"statistic": "lightness", "at_most": 60})
    tree["teach"]["augment"] = {"brightness": 0, "contrast": 0, "saturation": 0}
    assert parse_settings(tree, origin="x").teach.objectives[0].kind == "region_bounds"
    tree["distill"] = tree["distill"] | {"teacher": "live"}
    assert "distill.augment changes colours" in fault(tree)


def test_several_faults_are_told_at_once() -> None:
    message = fault(changed(data__image_sise=64, teach__optimizer={"learning_rate": -1}))
    assert "image_sise" in message
    assert "teach.optimizer.learning_rate" in message


def test_overrides_reach_into_sections_and_lists(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(changed(teach__objectives=[{"kind": "supervised"}])))
    overrides = ["teach.objectives.0.tau=0.5", "teach.optimizer.learning_rate=1e-4", "run.dir=elsewhere", "run.seed=3"]
    read = load_settings(path, overrides)
    assert read.teach.objectives[0].tau == 0.5  # type: ignore[union-attr]
    assert read.teach.optimizer.learning_rate == 1e-4
    assert (read.run.dir, read.run.seed) == ("elsewhere", 3)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("run.seed", "key.path=value"),
        ("teach.objectives.7.tau=1", "no position in a list of 1"),
        ("run.seed.deep=1", "plain value"),
        ("run.seed=[", "not valid YAML"),
        ("run.sead=1", "did you mean 'seed'"),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, override: str, named: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(changed(teach__objectives=[{"kind": "supervised"}], run__seed=1)))
    with pytest.raises(UserError, match=r"seed|objectives") as caught:
        load_settings(path, [override])
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("data: {source: a}\ndata: {source: b}\n", "stands twice"),
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
