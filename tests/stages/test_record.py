"""The record of stages: done is done, and contradictions are shown."""

from pathlib import Path

import pytest

from dpkd.errors import UserError
from dpkd.stages.record import RunFolder


def test_a_finished_stage_is_done_under_the_same_settings_alone(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert not folder.is_done("teach", {"lr": 1})
    with folder.running("teach", {"lr": 1}):
        assert not folder.is_done("teach", {"lr": 1})
    assert folder.is_done("teach", {"lr": 1})
    assert not folder.is_done("teach", {"lr": 2})


def test_a_failed_stage_is_not_done_and_its_seconds_add_up(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for _ in range(2):
        with pytest.raises(RuntimeError), folder.running("teach", {}):
            raise RuntimeError
    record = folder.stages()["teach"]
    assert record["status"] == "running"
    with folder.running("teach", {}):
        pass
    assert folder.stages()["teach"]["seconds"] >= record["seconds"]


def test_a_contradiction_shows_just_the_difference(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with folder.running("teach", {"optimizer": {"lr": 0.1, "decay": 0}, "losses": [1, 2]}):
        pass
    folder.refuse_contradiction("teach", {"optimizer": {"lr": 0.1, "decay": 0}, "losses": [1, 2]})
    with pytest.raises(UserError) as caught:
        folder.refuse_contradiction("teach", {"optimizer": {"lr": 0.2, "decay": 0}, "losses": [1]})
    message = str(caught.value)
    assert "optimizer.lr: 0.1 on disk, 0.2 now" in message
    assert "losses.1: 2 on disk, '(absent)' now" in message
    assert "decay" not in message


def test_a_broken_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "stages.json").write_text("{")
    with pytest.raises(UserError, match=r"stages\.json"):
        RunFolder(tmp_path).stages()
