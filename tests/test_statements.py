"""Expert statements from the file to the summary: faults before any work, losses in training, zero-shot figures."""

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dpkd import cli
from dpkd.data.attributes import read_attributes
from dpkd.errors import UserError
from dpkd.run.folder import RunFolder
from dpkd.stages import driver
from dpkd.stages.plan import left_to_do, stages_of
from dpkd.stages.worker import train_stages
from tests.runs import Command, settings_of, tiny, train_events

BOUNDS = [{"statistic": "area", "at_least": 0.005, "at_most": 0.01}, {"statistic": "compactness", "at_most": 0.1}]


def stated(run_dir: Path, table: Path, **data: Any) -> dict[str, Any]:
    """A tiny run whose teacher and one student learn attributes and bounds."""
    tree = tiny(run_dir, **{"source": None, **data})
    attributes = {"kind": "attributes", "weight": 0.5, "classify": 0.5}
    region = {"kind": "region_bounds", "of": "saliency", "bounds": BOUNDS}
    tree["data"]["attributes"] = str(table)
    tree["teachers"]["teacher"]["objectives"] += [attributes, region]
    conv = tree["distill"]["students"].pop("conv") | {"baseline": False}
    tree["distill"]["students"] = {"conv": conv | {"objectives": [*conv["objectives"], attributes, region]}}
    return tree


@pytest.fixture(scope="module")
def table(sample_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("table") / "attributes.yaml"
    path.write_text((sample_folder / "attributes.yaml").read_text())
    return path


@pytest.fixture(scope="module")
def whole(sample_folder: Path, table: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run to its end, under statements."""
    command = Command(stated(tmp_path_factory.mktemp("runs") / "stated", table, source=sample_folder))
    assert command.wait() == 0, command.output
    return command.folder


def again(whole: RunFolder, table: Path) -> dict[str, Any]:
    """The settings of the same run once more."""
    return stated(whole.path, table, source=Path(whole.stages()["pack"]["given"]["data"]["source"]["path"]))


def test_every_statement_is_trained_on_and_shown(whole: RunFolder) -> None:
    wanted = ("attributes.predict", "attributes.classify", "region_bounds.fit", "region_bounds.area")
    for stage, network in (("teach", "teacher"), ("distill", "student-conv")):
        last = [line for line in train_events(whole) if line["stage"] == stage][-1]
        board = EventAccumulator(str(whole.tensorboard / stage / network)).Reload()
        for objective in (*wanted, "region_bounds.compactness"):
            assert last[f"loss/{network}/{objective}"] > 0
            assert f"loss/{objective}" in board.Tags()["scalars"]


def test_the_summary_has_the_zero_shot_table(whole: RunFolder) -> None:
    summary = json.loads((whole.path / "summary.json").read_text())
    for network in (summary["teachers"]["teacher"], summary["students"]["conv"]):
        assert set(network["zero_shot"]) == {"val", "novel"}
        for figures in network["zero_shot"].values():
            assert figures["chance"] == 0.2
            assert 0 < figures["balanced"] < 1
    text = (whole.path / "summary.md").read_text()
    assert "## Zero-shot through attributes" in text
    assert "| val overall | val balanced | val chance | novel overall |" in text
    # all classes of a split have as many samples
    assert summary["teachers"]["teacher"]["zero_shot"]["val"]["overall"] == pytest.approx(
        summary["teachers"]["teacher"]["zero_shot"]["val"]["balanced"]
    )


def test_the_run_is_finished_until_a_row_changes(whole: RunFolder, table: Path, sample_folder: Path) -> None:
    settings = settings_of(again(whole, table))
    base, novel = ([path.name for path in (sample_folder / split).iterdir()] for split in ("base", "novel"))
    text, stages = table.read_text(), stages_of(settings)
    assert left_to_do(whole, settings, stages) == []
    try:
        table.write_text(_changed(text, next(name for name in novel if name != "unlabelled")))
        assert left_to_do(whole, settings, stages) == ["evaluate"]
        seen = next(name for name in base if name != "unlabelled")
        table.write_text(_changed(text, seen))
        with pytest.raises(UserError, match=rf"attributes.classes.{seen}.solidity: .* on disk, 0.123 now"):
            left_to_do(whole, settings, stages)
    finally:
        table.write_text(text)


def _changed(text: str, class_name: str) -> str:
    """The table with another solidity of the class."""
    line = next(line for line in text.splitlines() if line.strip().startswith(f"{class_name}:"))
    return text.replace(line, line[: line.index("solidity")] + "solidity: 0.123}")


@pytest.mark.parametrize("stages", ["prepare", "teach"])
def test_a_class_without_a_row_stops_before_the_stage(
    whole: RunFolder, sample_folder: Path, tmp_path: Path, stages: str, capfd: pytest.CaptureFixture[str]
) -> None:
    name = next(path.name for path in (sample_folder / "base").iterdir() if path.name != "unlabelled")
    text = (sample_folder / "attributes.yaml").read_text()
    (tmp_path / "table.yaml").write_text(text.replace(f"  {name}:", f"  {name}x:"))
    tree = stated(tmp_path / "run", tmp_path / "table.yaml", shards=whole.path / "shards")
    tree["prepare"]["name"] = "other"
    message = stopped(tree, stages, capfd)
    assert f"lacks 1 of 6 training classes: {name!r} (did you mean '{name}x'?)" in message
    assert not (whole.path / "shards" / "priors" / "other").exists()
    assert not (tmp_path / "run" / "teachers").exists()


def stopped(tree: dict[str, Any], stage: str, capfd: pytest.CaptureFixture[str]) -> str:
    """What a run that ends with exit code 2 says."""
    settings = settings_of(tree)
    if stage == "teach":
        plain = settings.model_dump(mode="json")
        assert cli.exit_code(lambda: train_stages((plain, [stage], None))) == 2
    else:
        assert cli.exit_code(lambda: driver.run(settings, stages=[stage])) == 2
    return capfd.readouterr().err


def test_a_bound_on_a_class_that_is_not_trained_on_is_named(
    whole: RunFolder, table: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name = read_attributes(str(table)).classes[0]
    tree = stated(tmp_path / "run", table, shards=whole.path / "shards")
    tree["teachers"]["teacher"]["objectives"][-1]["bounds"] = [
        {"statistic": "area", "at_most": 0.5, "classes": [f"{name}s"]}
    ]
    message = stopped(tree, "prepare", capfd)
    assert (
        f"teachers.teacher.objectives.3.bounds.0.classes names '{name}s', of which the split 'base' has no sample"
        in message
    )
    assert f"did you mean {name!r}?" in message


def test_a_table_at_fault_stops_before_anything_is_written(
    sample_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "table.csv").write_text("class,x\na,2\n")
    tree = stated(tmp_path / "run", tmp_path / "table.csv", source=sample_folder)
    assert cli.exit_code(lambda: driver.run(settings_of(tree))) == 2
    assert "a.x: 2 is out of range" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
