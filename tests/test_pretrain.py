"""Whole runs: every stage in order, continued exactly after kills and stops, the same on one worker and on two."""

import contextlib
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dpkd import cli
from dpkd.errors import UserError
from dpkd.log import EventReader
from dpkd.run.folder import RunFolder
from dpkd.stages import driver
from dpkd.stages.worker import train_stages
from dpkd.verbs.audit import audit
from tests.object_store import BUCKET, ObjectStore
from tests.runs import Command, all_weights, settings_of, tiny, train_events


def shards_of(whole: RunFolder) -> Path:
    return whole.path / "shards"


def losses(folder: RunFolder, stage: str) -> dict[int, dict[str, float]]:
    """Losses by step; of a step run twice, the last."""
    return {
        line["step"]: {key: value for key, value in line.items() if key.startswith(("loss/", "gradient_norm/"))}
        for line in train_events(folder)
        if line["stage"] == stage
    }


def assert_same_weights(one: RunFolder, other: RunFolder) -> None:
    first, second = all_weights(one), all_weights(other)
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, different[:5]


def test_a_run_ends_with_its_summary_and_exports(whole: RunFolder) -> None:
    summary = json.loads((whole.path / "summary.json").read_text())
    networks = [*summary["teachers"].values(), *summary["students"].values(), *summary["baselines"].values()]
    assert set(summary["students"]) == {"conv", "vit"}
    assert set(summary["baselines"]) == {"conv"}
    for network in networks:
        assert network["parameters"] > 0
        assert network["images_per_s"] > 0
        for split in ("val", "novel"):
            for shot in ("5way_1shot", "5way_5shot"):
                assert 0 < network["scores"][split][shot]["mean"] < 1
                assert network["scores"][split][shot]["ci95"] > 0
    assert {stage["status"] for stage in summary["stages"].values()} == {"done"}
    assert list(summary["stages"]) == ["pack", "prepare", "teach", "distill", "baseline-conv", "evaluate", "export"]
    for name in (
        "settings.yaml",
        "versions.json",
        "summary.md",
        "report.html",
        "export/conv/config.json",
        "export/vit/model.safetensors",
    ):
        assert (whole.path / name).stat().st_size > 0


def test_few_shot_accuracy_while_training_is_in_events_and_report_as_in_tensorboard(whole: RunFolder) -> None:
    events = [event for event in EventReader(whole.events).new() if event["kind"] == "evaluated"]
    logged = [(each["step"], each["scores"]["5way_5shot"]["mean"]) for each in events if each["stage"] == "teach"]
    board = EventAccumulator(str(whole.tensorboard / "teach" / "teacher")).Reload()
    shown = [(event.step, pytest.approx(event.value)) for event in board.Scalars("few_shot/val_5way_5shot")]
    assert logged == shown
    page = (whole.path / "report.html").read_text()
    assert "teach: accuracy in %, val, 5-shot" in page
    assert "data:image/png;base64," in page  # the samples with their maps


@pytest.mark.slow
@pytest.mark.parametrize("place", ["students/vit/model.safetensors", "export/vit/model.safetensors"])
def test_a_damaged_network_of_a_finished_run_is_written_again(whole: RunFolder, tmp_path: Path, place: str) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(whole.path, folder)
    tree = tiny(folder, source=None, shards=shards_of(whole))
    (folder / place).write_bytes(b"")
    command = Command(tree, "--stages", "prepare,teach,distill,evaluate,export")
    assert command.wait() == 0, command.output
    stage = "distill" if place.startswith("students") else "export"
    assert f"{folder / place} was changed or damaged: the stage {stage} runs again" in command.output
    assert (folder / place).read_bytes() == (whole.path / place).read_bytes()


def assert_accounted(folder: RunFolder, *, attempts: int, restarts: int = 0) -> dict[str, Any]:
    """The account of the run's time, which must cover it from its first event to its last."""
    events = [event for event in EventReader(folder.events).new() if "attempt" in event]
    goodput: dict[str, Any] = json.loads((folder.path / "goodput.json").read_text())
    length_ms = round(1000 * (events[-1]["time"] - events[0]["time"]))
    assert sum(round(1000 * seconds) for seconds in goodput["seconds"].values()) == length_ms
    assert (goodput["attempts"], goodput["restarts"]) == (attempts, restarts)
    assert {event["attempt"] for event in events if event["kind"] == "train"} <= {
        event["attempt"] for event in events if event["kind"] == "attempt_began"
    }
    return goodput


def test_the_time_of_a_run_is_accounted_and_shown(whole: RunFolder) -> None:
    goodput = assert_accounted(whole, attempts=1)
    stages, spent = whole.stages(), goodput["seconds"]
    prepared = stages["pack"]["seconds"] + stages["prepare"]["seconds"]
    trained = sum(stages[stage]["seconds"] for stage in ("teach", "distill", "baseline-conv"))
    assert spent["preparation"] == pytest.approx(prepared, abs=0.1)
    assert 0 < spent["training"] + spent["data_wait"] + spent["checkpoint"] < trained
    assert spent["evaluation"] > stages["evaluate"]["seconds"]
    assert spent["recovery"] == spent["lost_work"] == spent["idle"] == 0
    assert (goodput["steps"], goodput["lost_steps"]) == (18, 0)
    table = (whole.path / "summary.md").read_text().split("## Where the time went")[1]
    assert f"| {100 * goodput['shares']['training']:.1f} % | steps that count |" in table
    for stage in ("teach", "distill", "baseline-conv"):
        shown = EventAccumulator(str(whole.tensorboard / stage)).Reload().Scalars("goodput/training")
        assert [event.step for event in shown] == [1, 2, 3, 4, 5, 6]
        assert all(0 < event.value < 1 for event in shown)


@pytest.mark.nightly
@pytest.mark.slow
def test_a_killed_worker_costs_recovery_and_the_steps_since_the_last_save(whole: RunFolder, tmp_path: Path) -> None:
    tree = tiny(tmp_path / "restarted", source=None, shards=shards_of(whole))
    tree["teachers"]["teacher"]["training"] |= {
        "steps": 40,
        "checkpoint_every": 10,
        "evaluate_every": 40,
        "panels_every": 40,
    }
    command = Command(tree, "--stages", "teach")
    command.wait_for_step("teach", 15)
    kill_worker(command)
    assert command.wait() == 0, command.output
    goodput = assert_accounted(command.folder, attempts=1, restarts=1)
    (loop,) = [event for event in EventReader(command.folder.events).new() if event["kind"] == "loop_began"][1:]
    assert goodput["steps"] == 40
    assert 0 < goodput["lost_steps"] == reached(command.folder) - loop["step"]
    assert goodput["seconds"]["recovery"] > 0
    assert goodput["seconds"]["lost_work"] > 0
    assert goodput["seconds"]["idle"] == 0


def kill_worker(command: Command) -> None:
    """SIGKILL to the one training process."""
    beats = command.folder.hangs
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().decode().split("\0")
            if "dpkd.launch.watchdog" in words and str(beats) in words:
                os.kill(int(words[words.index("dpkd.launch.watchdog") + 5]), signal.SIGKILL)
                return
    raise AssertionError("no watchdog of a worker is running")


def reached(folder: RunFolder) -> int:
    """The last step that the first generation told of."""
    events = EventReader(folder.events).new()
    restart = next(place for place, event in enumerate(events) if event["kind"] == "restart")
    return max(event["step"] for event in events[:restart] if event["kind"] == "spent")


def test_every_objective_of_every_network_is_logged(whole: RunFolder) -> None:
    distilled = losses(whole, "distill")[6]
    for student in ("conv", "vit"):
        for objective in ("supervised", "logits", "features", "patches"):
            assert distilled[f"loss/student-{student}/{objective}"] > 0
    alone = losses(whole, "baseline-conv")[6]
    assert {key for key in alone if key.startswith("loss/")} == {"loss/baseline-conv/supervised"}
    assert {"loss/teacher/masked_prior.hog", "loss/teacher/masked_prior.edge"} <= losses(whole, "teach")[6].keys()


def test_a_finished_run_is_left_as_it_is(whole: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.path.rglob("*.safetensors")}
    settings = settings_of(json.loads(json.dumps(_tree_of(whole))))
    driver.run(settings)
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in whole.path.rglob("*.safetensors")} == before


def _tree_of(folder: RunFolder) -> dict[str, Any]:
    return tiny(folder.path, source=_source_of(folder))


def _source_of(folder: RunFolder) -> Path:
    return Path(folder.stages()["pack"]["given"]["data"]["source"]["path"])


def test_other_settings_than_those_on_disk_are_refused(whole: RunFolder) -> None:
    tree = _tree_of(whole)
    tree["teachers"]["teacher"]["optimizer"] = {"learning_rate": 0.5}
    with pytest.raises(UserError, match=r"teachers.teacher.optimizer.learning_rate: 0.001 on disk, 0.5 now"):
        driver.run(settings_of(tree))


def test_cadence_may_change_under_way(whole: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    tree = _tree_of(whole)
    tree["teachers"]["teacher"]["training"] |= {"log_every": 3, "checkpoint_every": 5}
    driver.run(settings_of(tree))
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "step"), [pytest.param("teach", 3, marks=pytest.mark.chaos), ("distill", 4)])
def test_a_run_killed_at_a_step_ends_bit_equal(whole: RunFolder, tmp_path: Path, stage: str, step: int) -> None:
    tree = tiny(tmp_path / "killed", source=None, shards=shards_of(whole))
    first = Command(tree, "--stages", "teach,distill,baselines")
    first.wait_for_step(stage, step)
    first.kill_all()
    again = Command(tree, "--stages", "teach,distill,baselines")
    assert again.wait() == 0, again.output
    assert f"{stage}: continues after step" in again.output
    assert_same_weights(whole, again.folder)
    audit(str(again.folder.path))
    goodput = assert_accounted(again.folder, attempts=2)
    assert goodput["steps"] == 18
    assert min(goodput["seconds"][name] for name in ("idle", "recovery", "lost_work")) > 0


@pytest.mark.nightly
@pytest.mark.slow
def test_a_run_with_its_checkpoints_on_an_object_store_goes_on_after_a_kill(
    whole: RunFolder, tmp_path: Path, object_store: ObjectStore
) -> None:
    tree = tiny(tmp_path / "remote", source=None, shards=shards_of(whole))
    tree["run"]["checkpoints"] = f"s3://{BUCKET}/remote"
    first = Command(tree, "--stages", "teach")
    first.wait_for_step("teach", 5)  # the save after step 4 has waited for the one after step 2
    first.kill_all()
    again = Command(tree, "--stages", "teach")
    assert again.wait() == 0, again.output
    assert "teach: continues after step" in again.output
    assert not (again.folder.path / "checkpoints").exists()
    name = "teachers/teacher/model.safetensors"
    assert (again.folder.path / name).read_bytes() == (whole.path / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "to_all"),
    [
        (signal.SIGTERM, False),
        pytest.param(signal.SIGTERM, True, marks=pytest.mark.chaos),
        pytest.param(signal.SIGUSR1, False, marks=pytest.mark.chaos),
        pytest.param(signal.SIGHUP, True, marks=pytest.mark.chaos),
    ],
)
def test_a_stopped_run_says_so_and_goes_on(whole: RunFolder, tmp_path: Path, number: int, to_all: bool) -> None:
    tree = tiny(tmp_path / "stopped", source=None, shards=shards_of(whole))
    tree["data"]["loader"] = {"workers": 1}
    command = Command(tree, "--stages", "teach,distill,baselines")
    command.wait_for_step("teach", 1)
    if to_all:  # as Slurm and a closing terminal do
        os.killpg(command.process.pid, number)
    else:
        command.process.send_signal(number)
    assert command.wait() == 75, command.output
    assert "saved; the same command goes on from there" in command.output
    assert "Traceback" not in command.output
    again = Command(tree, "--stages", "teach,distill,baselines")
    assert again.wait() == 0, again.output
    assert_same_weights(whole, again.folder)
    goodput = assert_accounted(again.folder, attempts=2)
    assert (goodput["steps"], goodput["lost_steps"]) == (18, 0)
    assert min(goodput["seconds"][name] for name in ("idle", "recovery", "checkpoint")) > 0


def assert_same_losses(one: RunFolder, other: RunFolder) -> None:
    for stage in ("teach", "distill"):
        expected, found = losses(one, stage), losses(other, stage)
        assert expected.keys() == found.keys()
        for step, each in expected.items():
            shared = {key: value for key, value in each.items() if "vit" not in key}  # its dropout is a rank's own
            assert {key: found[step][key] for key in shared} == pytest.approx(shared, abs=1e-4, rel=1e-4)


@pytest.mark.slow
def test_two_workers_see_the_same_batches_and_losses_as_one(whole: RunFolder, tmp_path: Path) -> None:
    tree = tiny(tmp_path / "two", source=None, shards=shards_of(whole))
    tree["launcher"]["workers"] = 2
    command = Command(tree, "--stages", "teach,distill,baselines")
    assert command.wait() == 0, command.output
    assert_same_losses(whole, command.folder)
    audit(str(command.folder.path))


@pytest.mark.slow
def test_torchrun_starts_two_workers_and_starts_them_again_after_a_kill(
    whole: RunFolder, sample_folder: Path, tmp_path: Path
) -> None:
    tree = tiny(tmp_path / "torchrun", source=sample_folder)
    tree["launcher"] = {"threads": 1, "pool_workers": 2}
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1")
    stages = ("--stages", "pack,prepare,teach,distill,baselines")
    refused = Command(tree, *stages, launcher=torchrun)
    assert refused.wait() != 0
    assert "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment of torchrun" in refused.output
    assert not refused.folder.path.exists()
    command = Command(tree, *stages, launcher=torchrun, environment={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})
    command.wait_for_step("teach", 3)
    kill_worker(command)
    assert command.wait() == 0, command.output
    assert_same_losses(whole, command.folder)
    audit(str(command.folder.path))


@pytest.mark.nightly
@pytest.mark.slow
def test_a_stop_of_torchrun_saves_and_the_same_command_goes_on(whole: RunFolder, tmp_path: Path) -> None:
    tree = tiny(tmp_path / "stopped-torchrun", source=None, shards=shards_of(whole))
    tree["launcher"] = {"threads": 1}
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    command = Command(tree, "--stages", "teach", launcher=torchrun)
    command.wait_for_step("teach", 1)
    command.process.send_signal(signal.SIGTERM)
    assert command.wait() != 0
    assert "saved; the same command goes on from there" in command.output
    again = Command(tree, "--stages", "teach,distill,baselines", launcher=torchrun)
    assert again.wait() == 0, again.output
    assert_same_losses(whole, again.folder)


def test_torchrun_is_told_before_work_that_its_workers_cannot_share_a_batch(whole: RunFolder, tmp_path: Path) -> None:
    tree = tiny(tmp_path / "three", source=None, shards=shards_of(whole))
    tree["launcher"] = {"threads": 1}
    command = Command(tree, launcher=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"))
    assert command.wait() != 0
    assert "WORLD_SIZE=3: 3 workers cannot share" in command.output
    tree["launcher"]["kind"] = "local"
    command = Command(tree, launcher=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"))
    assert command.wait() != 0
    assert "launcher.kind=local: each process of torchrun would be a run; remove the key" in command.output
    assert not command.folder.path.exists()


def test_an_audit_counts_what_was_used(whole: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["audit", str(whole.path)]) == 0
    assert "every step used exactly the samples of the order, each once" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["swap", "lose", "scribble"])
def test_an_audit_names_what_is_not_as_ordered(whole: RunFolder, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("settings.yaml", "stages.json"):
        shutil.copy(whole.path / name, folder / name)
    settings = yaml.safe_load((folder / "settings.yaml").read_text())
    settings["run"]["dir"], settings["data"]["shards"] = str(folder), str(shards_of(whole))
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    shutil.copytree(whole.path / "sample_log", folder / "sample_log")
    path = next((folder / "sample_log" / "teach").iterdir())
    head, *lines = path.read_text().splitlines(keepends=True)
    if damage == "swap":  # the samples of the second and third step
        (second, of_second), (third, of_third) = (line.split(" ") for line in lines[1:3])
        lines[1:3] = [f"{second} {of_third}", f"{third} {of_second}"]
    elif damage == "lose":
        del lines[1]
    path.write_text(("?\n" if damage == "scribble" else head) + "".join(lines))
    wanted = {"swap": "2 steps did not use", "lose": "teach step 2: no attempt has it", "scribble": path.name}
    with pytest.raises(UserError, match=wanted[damage]):
        audit(str(folder))


@pytest.mark.nightly
@pytest.mark.slow
def test_deepspeed_on_two_workers_gives_the_losses_of_plain_pytorch(whole: RunFolder, tmp_path: Path) -> None:
    tree = tiny(tmp_path / "zero", source=None, shards=shards_of(whole))
    tree["launcher"]["workers"] = 2
    tree["teachers"]["teacher"]["engine"] |= {"kind": "deepspeed", "zero_stage": 3}
    for student, stage in (("conv", 2), ("vit", 1)):
        tree["distill"]["students"][student]["engine"] = {"kind": "deepspeed", "zero_stage": stage}
    command = Command(tree, "--stages", "teach,distill,baselines")
    assert command.wait() == 0, command.output
    assert "[INFO]" not in command.output, command.output  # DeepSpeed's own lines are noise to a user
    assert_same_losses(whole, command.folder)


@pytest.mark.slow
def test_a_live_teacher_goes_on_learning(whole: RunFolder, tmp_path: Path) -> None:
    tree = tiny(tmp_path / "live", source=None, shards=shards_of(whole))
    tree["teachers"]["teacher"]["during_distill"] = "live"
    tree["distill"]["training"]["evaluate_every"] = 6
    command = Command(tree)
    assert command.wait() == 0, command.output
    assert "loss/teacher/supervised" in losses(command.folder, "distill")[6]
    summary = json.loads((command.folder.path / "summary.json").read_text())
    weights = all_weights(command.folder)
    moved = [name for name in weights if name.startswith("teachers/teacher:") and name.endswith("weight")]
    assert any(not torch.equal(weights[name], weights[name.replace("teachers/", "teachers-live/")]) for name in moved)
    assert summary["live_teachers"]["teacher"]["scores"]["novel"]["5way_1shot"]["mean"] > 0


@pytest.mark.nightly
@pytest.mark.slow
def test_a_full_disk_stops_the_run_with_the_earlier_state_whole(whole: RunFolder, tmp_path: Path) -> None:
    tree = tiny(tmp_path / "full", source=None, shards=shards_of(whole))
    command = Command(tree, "--stages", "teach", largest_file=40_000)
    assert command.wait() == 2, command.output
    assert "checkpoint at step 2 could not be written" in command.output
    assert "Traceback" not in command.output
    assert not list(Path(command.folder.checkpoints("teach")).glob("step-*"))
    again = Command(tree, "--stages", "teach")
    assert again.wait() == 0, again.output
    name = "teachers/teacher/model.safetensors"
    assert (again.folder.path / name).read_bytes() == (whole.path / name).read_bytes()


def test_a_run_folder_that_cannot_be_written_is_named(sample_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tree = tiny(Path("/proc/nowhere"), source=sample_folder)
    assert cli.exit_code(lambda: driver.run(settings_of(tree))) == 2
    assert "/proc/nowhere" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            {"teachers": {"teacher": {"training": {"batch_size": 512, "micro_batch_size": None}}}},
            ["512", "fewer than one batch"],
        ),
        ({"data": {"train": "nowhere"}}, ["nowhere", "base"]),
        ({"data": {"labels": {"kind": "listed", "path": "/nowhere.txt"}}}, ["/nowhere.txt"]),
        ({"evaluate": {"episodes": {"way": 9}}}, ["val", "5 labelled classes"]),
        ({"teachers": {"teacher": {"model": {"name": "resnet1000"}}}}, ["resnet1000"]),
        ({"teachers": {"teacher": {"model": {"arguments": {"layerz": 1}}}}}, ["layerz"]),
    ],
)
def test_what_cannot_be_trained_stops_before_training(
    whole: RunFolder, tmp_path: Path, change: dict[str, Any], named: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    tree = _merged(tiny(tmp_path / "bad", source=None, shards=shards_of(whole)), change)
    plain = settings_of(tree).model_dump(mode="json")
    assert cli.exit_code(lambda: train_stages((plain, ["teach"], None))) == 2
    message = capfd.readouterr().err
    assert all(words in message for words in named), message
    assert "Traceback" not in message
    assert not (tmp_path / "bad" / "teachers").exists()


def _merged(tree: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    both = dict(tree)
    for key, value in change.items():
        both[key] = _merged(tree[key], value) if isinstance(value, dict) and isinstance(tree.get(key), dict) else value
    return both


@pytest.mark.slow
def test_packing_that_is_stopped_exits_75_and_goes_on(sample_folder: Path, whole: RunFolder, tmp_path: Path) -> None:
    tree = tiny(tmp_path / "stopped", source=sample_folder)
    command = Command(tree, "--stages", "pack,prepare")
    while "pack" not in command.folder.stages():
        assert command.process.poll() is None, command.output
        time.sleep(0.02)
    command.process.send_signal(signal.SIGTERM)
    assert command.wait() == 75, command.output
    again = Command(tree, "--stages", "pack,prepare")
    assert again.wait() == 0, again.output
    for name in ("dataset.json", "base-000000.tar", "priors/default/novel-000000.tar"):
        assert (again.folder.path / "shards" / name).read_bytes() == (shards_of(whole) / name).read_bytes()


def test_one_class_alone_is_named(sample_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "images"
    one = max((sample_folder / "base").iterdir(), key=lambda folder: len(list(folder.iterdir())))
    shutil.copytree(one, source / "base" / one.name)
    for split in ("val", "novel"):
        shutil.copytree(sample_folder / split, source / split)
    settings = settings_of(tiny(tmp_path / "one", source=source))
    driver.run_pool_stages(settings, RunFolder(tmp_path / "one"), ["pack", "prepare"])
    assert cli.exit_code(lambda: train_stages((settings.model_dump(mode="json"), ["teach"], None))) == 2
    message = capfd.readouterr().err
    assert f"'base' holds 1 labelled class ({one.name})" in message, message
