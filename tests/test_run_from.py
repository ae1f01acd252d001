"""A new trial on the images, maps and teacher of another run, and settings that may change in a run folder."""

import hashlib
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from dpkd.errors import UserError
from dpkd.run.folder import RunFolder
from dpkd.settings import Settings
from dpkd.stages.plan import left_to_do, stages_of, with_origin
from tests.runs import CONV, Command, settings_of, tiny


def again(whole: RunFolder, run: Path) -> dict[str, Any]:
    """The settings of the whole run in another folder."""
    source = whole.stages()["pack"]["given"]["data"]["source"]["path"]
    return deepcopy(tiny(run, source=Path(source)))


def trial(whole: RunFolder, run: Path, *, objective: str = "features") -> dict[str, Any]:
    """A run with one other student on the teacher of the whole run."""
    tree, student = again(whole, run), {"model": CONV, "objectives": [{"kind": objective}], "baseline": False}
    tree["run"]["from"] = str(whole.path)
    tree["distill"]["students"] = {"small": deepcopy(student | {"engine": {"kind": "torch"}})}
    return tree


def left(tree: dict[str, Any]) -> list[str]:
    folder = RunFolder(tree["run"]["dir"])
    settings: Settings = with_origin(settings_of(tree), folder)
    return left_to_do(folder, settings, stages_of(settings))


def files_of(folder: Path) -> dict[str, tuple[int, str]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files}


@pytest.mark.slow
def test_two_students_are_distilled_from_the_teacher_of_another_run_which_stays_as_it_is(
    whole: RunFolder, tmp_path: Path
) -> None:
    before = files_of(whole.path)
    for objective in ("features", "logits"):
        tree = trial(whole, tmp_path / objective, objective=objective)
        assert left(tree) == ["distill", "evaluate", "export"]
        command = Command(tree)
        assert command.wait() == 0, command.output
        stages = command.folder.stages()
        assert [name for name in stages if stages[name].get("from") == str(whole.path)] == ["pack", "prepare", "teach"]
        assert not (command.folder.path / "shards").exists()
        teacher = "teachers/teacher/model.safetensors"
        assert (command.folder.path / teacher).read_bytes() == (whole.path / teacher).read_bytes()
        assert (command.folder.export / "small" / "model.safetensors").is_file()
        assert left(tree) == []
    assert files_of(whole.path) == before


def test_a_trial_that_uses_fewer_maps_has_those_of_the_other_run(whole: RunFolder, tmp_path: Path) -> None:
    tree = trial(whole, tmp_path / "run")
    tree["prepare"] = {"priors": [{"kind": "edge"}, {"kind": "saliency"}]}
    assert left(tree) == ["distill", "evaluate", "export"]


@pytest.mark.parametrize(
    ("section", "change", "named"),
    [
        ("data", {"samples_per_shard": 32}, "data.samples_per_shard: 64 on disk, 32 now (pack)"),
        ("prepare", {"priors": [{"kind": k} for k in ("edge", "saliency", "superpixel", "lbp")]}, "no prior map lbp"),
        ("data", {"image_size": 48}, "data.image_size: 32 on disk, 48 now (teach)"),
        ("data", {"shards": "/elsewhere"}, "data.shards=/elsewhere"),
        ("run", {"from": "/nowhere"}, "run.from=/nowhere: its stage pack is not done"),
    ],
)
def test_what_differs_from_the_other_run_is_named(
    whole: RunFolder, tmp_path: Path, section: str, change: dict[str, Any], named: str
) -> None:
    tree = trial(whole, tmp_path / "run")
    tree[section] |= change
    with pytest.raises(UserError) as caught:
        left(tree)
    assert named in str(caught.value)
    assert not (tmp_path / "run").exists()


def copy_of(whole: RunFolder, run: Path) -> RunFolder:
    """The run folder, to change it; its images stay."""
    shutil.copytree(whole.path, run, ignore=shutil.ignore_patterns("shards", "tb"))
    (run / "shards").symlink_to(whole.path / "shards")
    return RunFolder(run)


def test_a_stage_that_has_saved_nothing_takes_other_settings(whole: RunFolder, tmp_path: Path) -> None:
    folder, tree = copy_of(whole, tmp_path / "run"), again(whole, tmp_path / "run")
    folder.reopen(["distill"])
    tree["distill"]["students"]["vit"]["optimizer"] = {"learning_rate": 0.5}
    with pytest.raises(UserError, match=r"distill\.students\.vit\.optimizer\.learning_rate.*\n.*run\.from="):
        left(tree)
    shutil.rmtree(folder.checkpoints("distill"))
    assert left(tree) == ["distill", "evaluate", "export"]
    with folder.running("distill", {"other": "settings"}):
        assert not folder.sample_log("distill").exists()


def test_settings_of_a_later_stage_leave_the_teacher_alone(whole: RunFolder, tmp_path: Path) -> None:
    folder, tree = copy_of(whole, tmp_path / "run"), again(whole, tmp_path / "run")
    folder.reopen(["distill"])
    shutil.rmtree(folder.checkpoints("distill"))
    tree["data"]["views"] = {"global": {}, "local": {"count": 2, "size": 32}}
    tree["distill"]["students"]["vit"]["objectives"] = [{"kind": "supervised"}, {"kind": "features"}]
    tree["distill"]["augment"] = {"background": {"share": 0.5}}
    del tree["distill"]["students"]["conv"]
    assert "teach" not in left(tree)


def test_a_training_that_failed_in_its_first_second_takes_mended_settings(whole: RunFolder, tmp_path: Path) -> None:
    tree = trial(whole, tmp_path / "run")
    folder = RunFolder(tree["run"]["dir"])
    settings = with_origin(settings_of(tree), folder)
    folder = folder.acquire()
    with pytest.raises(UserError), folder.running("distill", {"distill": "misspelt"}):
        raise UserError("misspelt")
    assert left(tree) == ["distill", "evaluate", "export"]
    assert settings.data.shards == str(whole.path / "shards")
