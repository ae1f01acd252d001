"""The list of all settings, and the JSON schema of a settings file."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from dpkd import cli
from dpkd.settings import load_settings
from dpkd.verbs.settings import every_setting, settings_schema

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def names_of(tree: Any) -> Iterator[str]:
    """The last parts of all keys in plain settings."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield str(key)
        yield from names_of(value)


def test_every_key_of_a_run_is_listed() -> None:
    listed = {part for setting in every_setting() for part in setting.key.replace("{", ".").replace("}", "").split(".")}
    free = {"teacher", "conv", "global", "layers", "channels", "output_stride", "hog", "edge", "kind"}
    quickstart = next(path for path in CONFIGS if path.stem == "quickstart")
    tree = load_settings(quickstart, ["distill.students.vit=null"]).model_dump(mode="json")
    assert {name for name in names_of(tree) if not name.isdecimal()} - free <= listed


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_the_schema_accepts_our_files_and_refuses_a_misspelt_key(config: Path) -> None:
    tree, schema = yaml.safe_load(config.read_text()), settings_schema()
    jsonschema.validate(tree, schema)
    tree["data"]["image_szie"] = 64
    with pytest.raises(jsonschema.ValidationError, match="image_szie"):
        jsonschema.validate(tree, schema)


def test_the_page_of_settings_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["settings", "--form", "markdown"]) == 0
    page = (CONFIGS[0].parents[1] / "docs" / "settings.md").read_text()
    assert page.endswith(capsys.readouterr().out), "write it again: the command stands at its top"


def test_a_setting_is_shown_with_its_values_default_and_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["settings", "data.loader.block_shards"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "data.loader.block_shards: whole number ≥ 1 (default 8)"
    assert lines[1].startswith("    Shards shuffled together: a larger block mixes better")
    assert cli.main(["settings", "rotation", "--form", "markdown"]) == 0
    assert "| `teachers.<name>.objectives.<n>{rotation}.share` | number > 0 ≤ 1 | `1.0` |" in capsys.readouterr().out
    assert cli.main(["settings", "data.loder"]) == 2
    assert capsys.readouterr().err == "error: data.loder: no such setting (did you mean 'data.loader'?)\n"
