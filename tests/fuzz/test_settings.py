"""Settings files of any text are taken or refused with a message: no tag runs code, no alias fills the memory."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dpkd.run.folder import flatten
from dpkd.settings import load_settings
from dpkd.strict_yaml import MAX_NODES, read_yaml
from tests.fuzz.damage import any_bytes, in_child, outcome

SMALL = """\
run: {dir: runs/x, seed: 7}
data: &data
  source: {kind: table, path: t.csv, attribute_columns: [a, b]}
  splits: {kind: class, classes: {train: 3, val: 2, test: [x, y]}}
prepare: {priors: [{kind: edge, stride: 2}]}
teach:
  model: &model {name: resnet10t, arguments: {depth: 1, wide: [1, 2.5, true]}}
  objectives: [{kind: supervised}, {kind: masked_prior, targets: {edge: 1.0}}]
distill: {students: {small: {model: *model}}}
"""
LAUGHS = "a0: &a0 [lol]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
MERGES = "a0: &a0 {k: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 12))
BOMBS = {
    "aliases of aliases": LAUGHS,
    "merges of merges": MERGES,
    "an alias inside itself": "a: &a [*a]\n",
    "a mapping inside itself": "a: &a {b: *a}\n",
    "deep lists": "a: " + "[" * 10_000,
    "deep mappings": "{a: " * 10_000,
    "deep blocks": "".join(" " * i + "a:\n" for i in range(1_000)),
    "a long number": "a: " + "9" * 9_000,
    "a long number in hexadecimal": "a: 0x" + "f" * 9_000,
    "a number in base 60": "a: 1" + ":59" * 3_000,
    "a longer number in base 60": "a: 1" + ":59" * 80_000,
    "a float in base 60": "a: 1" + ":59" * 3_000 + ".5",
    "many keys": "".join(f"k{i}: 1\n" for i in range(40_000)),
    "a large file": "a: [" + "1, " * 80_000 + "]",
    "a long text": "a: " + "x" * 250_000,
    "nul": 'run: {dir: "a\\0b"}\n',
    "half a character": 'run: {dir: "a\\ud800b"}\n',
    "a list as a key": "? [a, b]\n: 1\n",
    "a number as a key": "1: {2: 3}\n",
    "nothing": "",
    "a date that is none": "a: 2001-99-99\n",
    "not a number": "a: !!int x\n",
    "not a truth": "a: !!bool x\n",
    "binary": "a: !!binary aGVsbG8=\n",
    "a set": "a: !!set {x, y}\n",
    "an object": "a: !!python/object/apply:os.system ['touch ran']\n",
    "a module": "a: !!python/module:os\n",
    "a name": "a: !!python/name:os.system\n",
    "a new object": "a: !!python/object/new:os.system ['touch ran']\n",
    "nan": "data: {bad_limit: .nan}\n",
}


def test_a_settings_file_that_is_a_bomb_is_refused_by_its_name_and_costs_little(tmp_path):
    for name, text in BOMBS.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    code = """
import os, sys
from pathlib import Path
from dpkd.errors import UserError
from dpkd.settings import load_settings
os.chdir(sys.argv[1])
for path in sorted(Path(".").iterdir()):
    try:
        load_settings(path, [])
    except UserError as error:
        assert str(path) in str(error) and len(str(error)) < 20_000, path
        print(path.stem)
"""
    assert sorted(in_child(code, str(tmp_path), memory_bytes=1 << 30).splitlines()) == sorted(BOMBS)
    assert not (tmp_path / "ran").exists()


@given(data=any_bytes([SMALL.encode()]))
def test_any_bytes_are_settings_or_refused(data, tmp_path_factory):
    place = tmp_path_factory.mktemp("settings") / "run.yaml"
    place.write_bytes(data)
    told = outcome(lambda: load_settings(place, []).model_dump(mode="json"))
    assert told is None or "run.yaml" in told


SCALARS = st.sampled_from(
    [
        "1",
        "0x1f",
        "1:30",
        "1e3",
        ".inf",
        "no",
        "~",
        "2001-01-01",
        "2001-99-99",
        "'x'",
        "&a 1",
        "*a",
        "<<",
        "=",
        "!!int x",
    ]
)
VALUES: st.SearchStrategy[str] = st.recursive(
    SCALARS | st.text("ab:,#-?&*![]{}'\"|>%@` ", max_size=6),
    lambda child: (
        st.lists(child, max_size=3).map(lambda items: f"[{', '.join(items)}]")
        | st.lists(st.tuples(SCALARS, child), max_size=3).map(
            lambda pairs: "{" + ", ".join(f"{key}: {value}" for key, value in pairs) + "}"
        )
    ),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def small_config(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("small") / "run.yaml"
    place.write_text(SMALL)
    return place


KEYS = ["run.seed", "data.source", "teach.model.arguments", "prepare.priors", "data.splits", "teach.objectives.0.tau"]


@given(key=st.sampled_from(KEYS), value=VALUES)
def test_any_override_is_taken_or_refused(small_config, key, value):
    outcome(lambda: yaml.safe_dump(load_settings(small_config, [f"{key}={value}"]).model_dump(mode="json")))


@given(key=st.text(max_size=30) | st.text("abdrt.0123-", max_size=9), value=VALUES)
def test_any_text_is_an_override_or_refused(small_config, key, value):
    outcome(lambda: load_settings(small_config, [f"{key}={value}", key]))


def size(tree: Any) -> int:
    return 1 + sum(map(size, tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()))


@given(VALUES)
def test_what_is_read_is_plain_small_and_what_plain_yaml_says(text):
    try:
        tree, plain = read_yaml(text), yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # plain YAML lets out what a tag's own code raises
        assert str(error)  # noqa: PT017 (either outcome is right, the message must be there)
        return
    assert size(tree) <= MAX_NODES
    leaves = flatten(tree).values()
    assert all(leaf is None or type(leaf) in (bool, int, float, str, list, dict) for leaf in leaves)
    assert repr(tree) == repr(_with_dates_as_text(plain))


def _with_dates_as_text(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {_with_dates_as_text(key): _with_dates_as_text(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_with_dates_as_text(each) for each in tree]
    return str(tree) if hasattr(tree, "isoformat") else tree


def test_aliases_are_taken_and_merges_are_told():
    text = "a: &a {x: 1, y: [1, 2]}\nc: [*a, *a]\n"
    assert read_yaml(text) == yaml.safe_load(text)
    with pytest.raises(yaml.YAMLError, match="give an alias of the whole section"):
        read_yaml("a: &a {x: 1}\nb: {<<: *a, y: 3}\n")
