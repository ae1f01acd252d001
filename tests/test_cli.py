"""The command line: what its verbs load, and where its lines go."""

import io
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpkd import cli
from dpkd.log import logger, show
from tests.data.packing import make_folder
from tests.runs import tiny

SCRIPT = """
import sys
from dpkd import cli
try:
    code = cli.main(sys.argv[2:])
except SystemExit as end:
    code = end.code
print(code, [name for name in sys.argv[1].split(",") if name in sys.modules], file=sys.stderr)
"""
HEAVY = ("torch", "timm", "ray", "pyarrow", "fsspec", "rich", "PIL", "numba", "sklearn")


COUNTS = {"base/a": 8, "base/b": 8, "val/a": 2, "val/b": 2, "novel/c": 2, "novel/d": 2}


def settings_at(folder: Path, **students: Any) -> Path:
    """A settings file of a tiny run, with other students where given."""
    source = make_folder(folder / "images", counts=COUNTS)
    tree = tiny(folder / "run", source=source)
    tree["evaluate"]["episodes"] |= {"way": 2, "shots": [1], "queries": 1}
    tree["distill"]["students"] |= students
    config = folder / "settings.yaml"
    config.write_text(yaml.safe_dump(tree))
    return config


@pytest.mark.parametrize(
    ("verb", "absent"),
    [("--help", (*HEAVY, "pydantic", "numpy", "cv2")), ("plan --fast", HEAVY), ("pack", ("torch",))],
)
def test_a_verb_loads_no_package_that_it_does_not_need(verb: str, absent: tuple[str, ...], tmp_path: Path) -> None:
    options = [] if verb == "--help" else ["--config", str(settings_at(tmp_path))]
    command = [sys.executable, "-c", SCRIPT, ",".join(absent), *verb.split(), *options]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ended.stderr == "0 []\n", ended.stdout


MISSPELT = {"model": "vit_tiny_patch16_244"}
UNFIT = {"model": {"name": "vit_tiny_patch16_224", "arguments": {"patch_size": 48}}}
WRONG = {"model": {"name": "resnet10t", "arguments": {"depht": 3}}}
NOWHERE = {"model": "resnet10t", "weights": "missing.safetensors"}


@pytest.mark.parametrize(
    ("student", "named"),
    [
        (
            MISSPELT,
            "distill.students.new: model.name 'vit_tiny_patch16_244' is not a timm model; nearest: vit_tiny_patch16_",
        ),
        (UNFIT, "distill.students.new: model 'vit_tiny_patch16_224' does not run on 32 px images"),
        (WRONG, "distill.students.new: model.arguments: timm refuses 'resnet10t' with depht=3"),
        (NOWHERE, "distill.students.new.weights=missing.safetensors is not a file"),
    ],
)
def test_plan_meets_a_network_that_cannot_be_built(student, named, tmp_path, capsys) -> None:
    assert cli.main(["plan", "--config", str(settings_at(tmp_path, new=student))]) == 2
    assert capsys.readouterr().err.startswith(f"error: {named}")


def test_plan_meets_a_table_that_gives_no_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images.csv").write_text("path,label\na.jpg,cat\n")
    source = f"data.source={tmp_path / 'images.csv'}"
    assert cli.main(["plan", "--fast", "--config", str(settings_at(tmp_path)), source]) == 2
    assert "data.source.label_column is not set: give data.source={kind: table" in capsys.readouterr().err


def test_plan_builds_every_network_and_allocates_no_weights(tmp_path: Path) -> None:
    large = {"model": {"name": "vit_giant_patch14_dinov2", "arguments": {"patch_size": 8}}}  # 1.1 billion parameters
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert cli.main(["plan", "--config", str(settings_at(tmp_path, new=large))]) == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KB, where the weights take 4.5 GB


def test_plan_meets_a_split_that_the_packed_images_lack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(settings_at(tmp_path))
    assert cli.main(["pack", "--config", config]) == 0
    assert cli.main(["plan", "--fast", "--config", config]) == 0
    capsys.readouterr()
    assert cli.main(["plan", "--fast", "--config", config, "data.test=novle"]) == 2
    assert "data.test='novle' is no split" in (error := capsys.readouterr().err)
    assert "did you mean 'novel'" in error


def test_characters_that_the_output_lacks_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    logger.info("dpkd · Zürich")
    show("≥ 3")
    assert written.getvalue() == b"dpkd \\xb7 Z\\xfcrich\n\\u2265 3\n"


WITHOUT_TRAIN = """
from importlib.machinery import PathFinder

find = PathFinder.find_spec
absent = ("ray", "deepspeed", "tensorboard")
PathFinder.find_spec = lambda name, *rest: None if name.partition(".")[0] in absent else find(name, *rest)
"""


def test_the_extra_for_training_is_asked_for_where_it_is_missing_and_not_before(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_TRAIN)
    config = str(settings_at(tmp_path))

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(tmp_path), str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "dpkd.cli", *words, "--config", config]
        environment = os.environ | {"PYTHONPATH": path}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert run("pretrain", "--stages", "pack,prepare").returncode == 0
    refused = run("plan", "--fast")
    assert refused.returncode == 2
    assert refused.stderr == "error: this run needs tensorboard: pip install 'dpkd[train]'\n"
    assert "ray: pip install" in run("plan", "--fast", "launcher.kind=ray").stderr


def test_masks_in_a_folder_take_no_number_of_best_classes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["predict", "export", "photos", "--out", "masks", "--top", "2"]) == 2
    assert "--top 2: masks in the folder masks" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        [],
        ["nowhere"],
        ["photos", "more-photos"],
        ["--config", "missing.yaml"],
        ["--config", "configs/quickstart.yaml", "--stages", "pack,teech"],
        ["--config", "configs/quickstart.yaml", "--students", "resnet18"],
        ["--unknown"],
    ],
)
def test_the_module_and_the_command_are_one_command_line(words: list[str]) -> None:
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root)}
    said = [
        subprocess.run(
            [sys.executable, "-m", *called, *words],
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        for called in (["dpkd.pretrain"], ["dpkd.cli", "pretrain"])
    ]
    assert (said[0].returncode, said[0].stdout, said[0].stderr) == (said[1].returncode, said[1].stdout, said[1].stderr)
    assert said[0].returncode == (0 if words == ["--help"] else 2)
    assert said[0].stdout + said[0].stderr
