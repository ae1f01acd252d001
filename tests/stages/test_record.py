"""The record of stages: done is done, and contradictions are shown."""

from pathlib import Path

import pytest

from dpkd.errors import UserError
from dpkd.io.fence import StaleAttempt
from dpkd.run.folder import RunFolder


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
    with folder.running("teach", {"optimizer": {"lr": 0.1, "decay": 0}, "objectives": [1, 2]}):
        pass
    with folder.running("distill", {"optimizer": {"lr": 0.1}}):
        pass
    folder.refuse_contradictions({"teach": {"optimizer": {"lr": 0.1, "decay": 0}, "objectives": [1, 2]}, "other": {}})
    changed = {"teach": {"optimizer": {"lr": 0.2, "decay": 0}, "objectives": [1]}}
    changed["distill"] = {"optimizer": {"lr": 0.2}}
    with pytest.raises(UserError) as caught:
        folder.refuse_contradictions(changed)
    assert str(caught.value).splitlines()[1:-1] == [
        "  objectives.1: 2 on disk, '(absent)' now (teach)",
        "  optimizer.lr: 0.1 on disk, 0.2 now (teach, distill)",
    ]


def test_a_setting_of_a_later_version_is_no_difference_while_it_is_off(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    old = {"model": {"name": "resnet18"}, "weights": None}
    with folder.running("teach", old):
        pass
    for off in (None, False, "none", [], {}):
        new = old | {"model": {"name": "resnet18", "control": off}}
        folder.refuse_contradictions({"teach": new})
        assert folder.is_done("teach", new)
    for on in (True, "shuffle", 0, [0], {"kind": "none", "share": 0.5}):
        new = old | {"model": {"name": "resnet18", "control": on}}
        assert not folder.is_done("teach", new)
    assert not folder.is_done("teach", old | {"weights": False})  # both have it: another value is a difference
    assert not folder.is_done("teach", {"weights": None})


def test_a_broken_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "stages.json").write_text("{")
    with pytest.raises(UserError, match=r"stages\.json"):
        RunFolder(tmp_path).stages()


def test_changed_and_missing_files_of_a_stage_are_faults(tmp_path: Path) -> None:
    folder, outside = RunFolder(tmp_path / "run"), tmp_path / "elsewhere" / "dataset.json"
    outside.parent.mkdir()
    made = [folder.path / "teacher" / "model.safetensors", outside]
    with folder.running("teach", {}, makes=lambda: made):
        for path in made:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"weights")
    assert folder.is_done("teach", {})
    made[0].write_bytes(b"weightz")
    outside.unlink()
    assert folder.faults("teach") == [f"{made[0]} was changed or damaged", f"{outside} is missing"]
    for path in made:
        path.write_bytes(b"weights")
    (tmp_path / "run").rename(tmp_path / "moved")
    moved = RunFolder(tmp_path / "moved")
    assert moved.is_done("teach", {})
    assert moved.faults("teach") == []


def test_a_record_that_was_changed_is_named(tmp_path: Path) -> None:
    with RunFolder(tmp_path).running("teach", {"lr": 1}):
        pass
    path = tmp_path / "stages.json"
    path.write_text(path.read_text().replace('"lr": 1', '"lr": 2'))
    with pytest.raises(UserError, match=r"stages\.json cannot be read .*changed since it was written"):
        RunFolder(tmp_path).stages()


def test_a_folder_in_the_place_of_the_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "stages.json").mkdir()
    with pytest.raises(UserError, match=r"stages\.json cannot be read"):
        RunFolder(tmp_path).stages()


def _follow(path: Path) -> None:
    """A newer attempt at the run does the whole stage."""
    with RunFolder(path).acquire().running("teach", {}):
        pass


def test_an_attempt_that_a_newer_one_followed_neither_begins_nor_ends_a_stage(tmp_path: Path) -> None:
    older = RunFolder(tmp_path).acquire()
    with pytest.raises(StaleAttempt, match="attempt 2 at this run has begun"), older.running("teach", {}):
        _follow(tmp_path)
    with pytest.raises(StaleAttempt), older.running("distill", {}):
        raise AssertionError("it has begun")
    assert {stage: record["status"] for stage, record in older.stages().items()} == {"teach": "done"}
    assert RunFolder(tmp_path).acquire().attempt == 3


def test_what_an_attempt_makes_beside_is_its_own_and_goes_with_the_next_attempt(tmp_path: Path) -> None:
    older = RunFolder(tmp_path).acquire()
    with older.scratch("export") as made:
        assert made.is_dir()
    assert not made.exists()

    def write_late() -> None:
        with older.scratch("export") as made, RunFolder(tmp_path).acquire().scratch("export") as other:
            assert other != made
            (made / "file").touch()

    with pytest.raises(StaleAttempt, match="attempt 2 at this run has begun"):
        write_late()


def test_an_error_of_an_attempt_that_a_newer_one_followed_leaves_the_record_alone(tmp_path: Path) -> None:
    older = RunFolder(tmp_path).acquire()

    def fail() -> None:
        with older.running("teach", {}):
            _follow(tmp_path)
            raise RuntimeError("its peers are gone")

    with pytest.raises(StaleAttempt):
        fail()
    assert older.is_done("teach", {})
