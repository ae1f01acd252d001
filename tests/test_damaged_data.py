"""Whole runs over damaged data: what is bad is named, counted and left out, or stops the run past the limit."""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dpkd import cli
from dpkd.data.shards import Dataset
from dpkd.priors.store import PriorSet
from dpkd.run.folder import RunFolder
from dpkd.stages import driver
from dpkd.stages.worker import train_stages
from tests.damage import change_member, cut_inside, flip_header
from tests.runs import CONV, Command, settings_of, tiny, train_events

BATCH_SIZE = 16
TRAINED = ("teach", "distill")


@dataclass(frozen=True)
class Damaged:
    """A run that is packed; one image was bad before, and two are since: a header in base, the last sample of val."""

    tree: dict[str, Any]
    shards: Path
    flipped: str
    cut: str
    num_steps: int
    """Of a stage: two epochs at least, and one step less than if the sample that cannot be read were counted."""


@pytest.fixture(scope="module")
def damaged(sample_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Damaged:
    folder = tmp_path_factory.mktemp("damaged")
    source = Path(shutil.copytree(sample_folder, folder / "images"))
    whole = next((source / "base").glob("*/*.jpg"))
    whole.with_name("broken.jpg").write_bytes(whole.read_bytes()[:300])
    tree = tiny(folder / "run", source=source)
    driver.run_pool_stages(settings_of(tree), RunFolder(folder / "run"), ["pack"])
    dataset = Dataset.open(str(folder / "run" / "shards"))
    base, val = dataset.split("base"), dataset.split("val")
    flipped = f"{base.info.shards[0].name}/{change_member(base, 3, 'jpg', flip_header)}"
    (cut,) = cut_inside(val, val.num_samples - 1)
    num_steps = math.ceil(2 * base.num_samples / BATCH_SIZE)
    epochs = (num_steps + 0.5) * BATCH_SIZE / (base.num_samples - 0.5)
    for trained in (tree["teachers"]["teacher"], tree["distill"]):
        trained["training"] |= {"steps": None, "epochs": epochs, "batch_size": BATCH_SIZE, "evaluate_every": 7}
    return Damaged(tree, folder / "run" / "shards", flipped, f"{val.info.shards[-1].name}/{cut}", num_steps)


@pytest.fixture(scope="module")
def finished(damaged: Damaged) -> RunFolder:
    """The rest of that run, under the default limit of 1 %."""
    command = Command(damaged.tree)
    assert command.wait() == 0, command.output
    assert "quarantined: 3 samples (1 in pack, 2 in prepare)" in command.output
    return command.folder


def test_the_bad_samples_and_no_others_are_named(damaged: Damaged, finished: RunFolder) -> None:
    lines = [json.loads(line) for line in finished.quarantine.read_text().splitlines()]
    reason_of = {line["item"]: line["reason"] for line in lines if line.get("counted", True)}
    assert [Path(item).name for item in reason_of if item not in (damaged.flipped, damaged.cut)] == ["broken.jpg"]
    assert "changed after packing" in reason_of[damaged.flipped]
    assert "the shard is cut short" in reason_of[damaged.cut]
    assert {line["item"] for line in lines if not line.get("counted", True)} == {
        damaged.flipped.partition("/")[0],
        damaged.cut.partition("/")[0],
    }


def test_they_are_counted_in_the_summary_and_in_tensorboard(finished: RunFolder) -> None:
    assert json.loads((finished.path / "summary.json").read_text())["quarantine"] == {"pack": 1, "prepare": 2}
    for stage in (*TRAINED, "evaluate"):
        events = EventAccumulator(str(finished.tensorboard / stage)).Reload()
        counts = {name: events.Scalars(f"quarantine/{name}")[-1].value for name in ("samples", "pack", "prepare")}
        assert counts == {"samples": 3, "pack": 1, "prepare": 2}


def test_an_epoch_is_as_long_as_the_samples_that_can_be_read(damaged: Damaged, finished: RunFolder) -> None:
    """Both stages drew every other sample twice: one that cannot be read would have stopped them."""
    for stage in TRAINED:
        assert max(line["step"] for line in train_events(finished) if line["stage"] == stage) == damaged.num_steps


def test_the_same_run_stops_at_limit_zero_with_what_to_do(
    damaged: Damaged, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shards = shutil.copytree(damaged.shards, tmp_path / "shards", ignore=shutil.ignore_patterns("priors"))
    tree = tiny(tmp_path / "strict", source=None, shards=Path(shards))
    tree["data"]["bad_limit"] = 0.0
    assert cli.exit_code(lambda: driver.run(settings_of(tree))) == 2
    message = capfd.readouterr().err
    assert "data.bad_limit=0 allows" in message
    assert damaged.flipped in message or damaged.cut in message
    assert f"All are listed in {tmp_path / 'strict' / 'quarantine.jsonl'}: repair or remove them" in message
    assert "Traceback" not in message
    assert not (tmp_path / "strict" / "teachers").exists()


def test_without_prior_maps_a_damaged_sample_stops_training_by_name(
    damaged: Damaged, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shards = shutil.copytree(damaged.shards, tmp_path / "shards", ignore=shutil.ignore_patterns("priors"))
    tree = tiny(tmp_path / "plain", source=None, shards=Path(shards))
    tree["prepare"] = {"priors": []}
    tree["teachers"]["teacher"] |= {"model": CONV, "objectives": [{"kind": "supervised"}]}
    tree["teachers"]["teacher"]["training"] |= {"steps": damaged.num_steps, "evaluate_every": 1000}
    tree["distill"]["students"] = {"conv": {"model": CONV, "objectives": [{"kind": "supervised"}, {"kind": "logits"}]}}
    assert cli.exit_code(lambda: driver.run(settings_of(tree), stages=["prepare"])) == 0
    plain = settings_of(tree).model_dump(mode="json")
    assert cli.exit_code(lambda: train_stages((plain, ["teach"], None))) == 2
    shard, _, key = damaged.flipped.partition("/")
    assert f"{shard}, sample '{key}': its bytes changed after packing" in capfd.readouterr().err


def test_the_prior_set_lists_just_those_two(damaged: Damaged, finished: RunFolder) -> None:
    dataset = Dataset.open(str(damaged.shards))
    priors = PriorSet.open(dataset.url, "default")
    assert {name: numbers for name, numbers in priors.manifest.unreadable.items() if numbers} == {
        "base": (3,),
        "val": (dataset.split("val").num_samples - 1,),
    }
