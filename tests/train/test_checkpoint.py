"""A checkpoint is whole or absent, and only a whole one loads."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from dpkd.errors import UserError
from dpkd.train.checkpoint import Checkpoints, LeftOut, RandomState
from dpkd.world import World

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


class Value:
    """A part that is one number."""

    def __init__(self, value: int) -> None:
        self.value = value

    def save(self, folder: Path) -> None:
        (folder / "value.txt").write_text(str(self.value))
        (folder / "more.bin").write_bytes(bytes(1000))

    def load(self, folder: Path) -> None:
        self.value = int((folder / "value.txt").read_text())


def saved(folder: Path, steps: list[int], *, keep: int = 3) -> Checkpoints:
    checkpoints = Checkpoints(folder, world=ALONE, keep=keep)
    for step in steps:
        checkpoints.save(step, {"a": Value(step)})
    return checkpoints


def loaded(checkpoints: Checkpoints) -> tuple[int, int]:
    value = Value(-1)
    return checkpoints.load_newest({"a": value}), value.value


def test_the_newest_loads_and_nothing_is_step_zero(tmp_path: Path) -> None:
    assert loaded(Checkpoints(tmp_path / "none", world=ALONE, keep=1)) == (0, -1)
    assert loaded(saved(tmp_path, [1, 2, 10])) == (10, 10)


@pytest.mark.parametrize("path", ["a/value.txt", "a/more.bin", "manifest.json"])
@pytest.mark.parametrize("damage", ["delete", "truncate", "flip", "empty"])
def test_a_damaged_one_is_passed_over_for_the_one_before(
    tmp_path: Path, path: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = saved(tmp_path, [1, 2])
    file = tmp_path / "step-00000002" / path
    content = bytearray(file.read_bytes())
    if damage == "delete":
        file.unlink()
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "truncate":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[0] ^= 1
        file.write_bytes(content)
    assert loaded(checkpoints) == (1, 1)
    assert "step-00000002 is damaged" in capsys.readouterr().out


def test_swapped_files_are_noticed(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, [1, 2])
    shutil.copy(tmp_path / "step-00000001" / "a" / "value.txt", tmp_path / "step-00000002" / "a" / "value.txt")
    assert loaded(checkpoints) == (1, 1)


def test_all_damaged_is_an_error_that_names_the_folder(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, [1])
    (tmp_path / "step-00000001" / "manifest.json").write_text(json.dumps({"format": 99, "files": {}}))
    with pytest.raises(UserError, match=str(tmp_path)):
        loaded(checkpoints)


def test_what_was_left_of_a_broken_save_neither_loads_nor_stays(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, [1])
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".step-00000002-dead")
    assert loaded(checkpoints) == (1, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    saved(tmp_path, [1, 2, 3, 4], keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_saving_a_damaged_step_again_mends_it(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, [1, 2])
    (tmp_path / "step-00000002" / "a" / "value.txt").unlink()
    assert loaded(checkpoints) == (1, 1)
    checkpoints.save(2, {"a": Value(2)})
    assert loaded(checkpoints) == (2, 2)


class Failing(Value):
    """A part whose disk is full."""

    def save(self, folder: Path) -> None:
        super().save(folder)
        raise OSError(28, "No space left on device")


def test_a_save_that_fails_leaves_the_earlier_one(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, [1])
    with pytest.raises(UserError, match="No space left on device"):
        checkpoints.save(2, {"a": Failing(2)})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert loaded(checkpoints) == (1, 1)


def test_dropout_goes_on_as_if_not_interrupted(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, world=ALONE, keep=1)
    state = RandomState(ALONE)
    checkpoints.save(1, {"random": state})
    expected = torch.rand(4)
    torch.rand(99)
    assert checkpoints.load_newest({"random": state}) == 1
    assert torch.equal(torch.rand(4), expected)


def test_a_stage_goes_on_only_without_the_samples_that_it_began_without(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, world=ALONE, keep=1)
    checkpoints.save(2, {"samples": LeftOut((3, 8), ALONE)})
    assert checkpoints.load_newest({"samples": LeftOut((3, 8), ALONE)}) == 2
    for changed in ((3,), (3, 8, 9), ()):
        with pytest.raises(UserError, match=r"2 samples .* could not be read when the stage began.*deleting"):
            checkpoints.load_newest({"samples": LeftOut(changed, ALONE)})


def test_a_checkpoint_that_does_not_say_what_was_left_out_loads(tmp_path: Path) -> None:
    saved(tmp_path, [4])
    assert Checkpoints(tmp_path, world=ALONE, keep=1).load_newest({"samples": LeftOut((1,), ALONE)}) == 4
