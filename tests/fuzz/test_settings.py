"""Settings files of any text are taken or refused with a message: no tag runs code, no alias fills the memory."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dpkd.config import read_yaml
from dpkd.errors import UserError
from dpkd.settings import load_settings, parse_settings
from tests.fuzz.damage import any_bytes, outcome

SMALL = """\
run: {dir: runs/x, seed: 7}
data: &data
  source: {kind: table, path: t.csv, attribute_columns: [a, b]}
  splits: {kind: class, classes: {train: 3, val: 2, test: [x, y]}}
prepare: {priors: [{kind: edge, stride: 2}]}
teachers:
  teacher:
    model: &model {name: resnet10t, arguments: {depth: 1, wide: [1, 2.5, true]}}
    objectives: [{kind: supervised}, {kind: masked_prior, targets: {edge: 1.0}}]
distill: {students: {small: {model: *model}}}
"""
REFUSED = {
    "an alias inside itself": "a: &a [*a]\n",
    "a mapping inside itself": "a: &a {b: *a}\n",
    "deep lists": "a: " + "[" * 10_000,
    "nul": 'run: {dir: "a\\0b"}\n',
    "a list as a key": "? [a, b]\n: 1\n",
    "nothing": "",
    "a date that is none": "a: 2001-99-99\n",
    "not a number": "a: !!int x\n",
    "an object": "a: !!python/object/apply:os.system ['touch ran']\n",
    "a module": "a: !!python/module:os\n",
    "nan": "data: {bad_limit: .nan}\n",
}


@pytest.mark.parametrize("text", REFUSED.values(), ids=REFUSED)
def test_a_settings_file_of_odd_content_is_refused_by_its_name_and_runs_nothing(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError, match=r"run\.yaml") as caught:
        load_settings(tmp_path / "run.yaml", [])
    assert len(str(caught.value)) < 20_000
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


KEYS = [
    "run.seed",
    "data.source",
    "teachers.teacher.model.arguments",
    "prepare.priors",
    "data.splits",
    "teachers.teacher.objectives.0.tau",
]


@given(key=st.sampled_from(KEYS), value=VALUES)
def test_any_override_is_taken_or_refused(small_config, key, value):
    def written_and_read() -> None:
        settings = load_settings(small_config, [f"{key}={value}"])
        text = yaml.safe_dump(settings.model_dump(mode="json"))
        assert parse_settings(yaml.safe_load(text), origin="written") == settings

    outcome(written_and_read)


@given(key=st.text(max_size=30) | st.text("abdrt.0123-", max_size=9), value=VALUES)
def test_any_text_is_an_override_or_refused(small_config, key, value):
    told = outcome(lambda: load_settings(small_config, [f"{key}={value}", key]))
    assert told is not None or "=" in key


@given(VALUES)
def test_what_is_read_is_what_plain_yaml_reads_with_dates_as_text(text):
    try:
        tree, plain = read_yaml(text), yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, TypeError) as error:  # plain YAML lets out what a tag's own code raises
        assert str(error)  # noqa: PT017 (either outcome is right, the message must be there)
        return
    assert repr(tree) == repr(_with_dates_as_text(plain))


def _with_dates_as_text(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {_with_dates_as_text(key): _with_dates_as_text(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_with_dates_as_text(each) for each in tree]
    return str(tree) if hasattr(tree, "isoformat") else tree
