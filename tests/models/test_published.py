"""Published weights: from the cache without a connection, or refused before any work with the file to fetch."""

import os
import subprocess
import sys
from pathlib import Path

import timm
from safetensors.torch import save_file

from tests.data.packing import make_folder

MODEL = "test_resnet"
SHORT = ["launcher.threads=1", "data.image_size=32", "data.loader.workers=0", "distill.training.steps=1"]


def pretrain(folder: Path) -> subprocess.CompletedProcess[str]:
    """Two stages with a teacher of published weights, on a machine that has no connection."""
    make_folder(folder / "photos", counts={"cat": 8, "dog": 8})
    command = [sys.executable, "-m", "dpkd.pretrain", "photos", "--teacher", MODEL, "--students", MODEL]
    command += [*SHORT, "distill.training.epochs=null", "--stages", "pack,prepare,distill"]
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    return subprocess.run(command, cwd=folder, env=offline, capture_output=True, text=True, check=False)


def test_weights_that_cannot_be_downloaded_are_refused_before_any_work(tmp_path: Path) -> None:
    ended = pretrain(tmp_path)
    assert ended.returncode == 2
    assert "error: teachers.teacher: the weights of 'test_resnet' are not on this machine" in ended.stderr
    assert "`hf download timm/test_resnet.r160_in1k model.safetensors`" in ended.stderr
    assert not (tmp_path / "runs").exists()


def test_weights_in_the_cache_need_no_connection(tmp_path: Path) -> None:
    stored = tmp_path / "cache" / "hub" / "models--timm--test_resnet.r160_in1k"
    (stored / "refs").mkdir(parents=True)
    (stored / "refs" / "main").write_text("0" * 40)
    snapshot = stored / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    save_file(timm.create_model(MODEL).state_dict(), snapshot / "model.safetensors")
    ended = pretrain(tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert (tmp_path / "runs/photos/students" / MODEL / "model.safetensors").is_file()
