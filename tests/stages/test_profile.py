"""`dpkd profile`: the table of a step's parts, the trace, and what it leaves alone."""

import gzip
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.profiler import profile as torch_profile
from torch.profiler import record_function

from dpkd.errors import UserError
from dpkd.settings import Settings
from dpkd.stages.run import Run
from dpkd.verbs.profile import parts, profile


def settings_in(folder: Path, run: Run, *, steps: int = 6) -> Settings:
    """The settings of the run in another folder, with two micro-batches of 8 images and log lines after even steps."""
    tree = run.settings.model_dump(mode="json")
    tree["run"]["dir"] = str(folder)
    training = {"steps": steps, "epochs": None, "batch_size": 16, "micro_batch_size": 8, "log_every": 2}
    tree["teachers"]["teacher"]["training"] |= training
    tree["distill"]["training"] |= training
    for student in tree["distill"]["students"].values():
        student["objectives"] = [{"kind": "supervised"}, {"kind": "logits"}]
    return Settings.model_validate(tree)


def test_every_part_of_a_step_is_in_the_table_and_the_run_stays_as_it_is(
    untrained_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(untrained_run.folder.path, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    profile(settings_in(folder, untrained_run), "distill", steps=4)
    lines = capsys.readouterr().out.splitlines()
    names = {line[2:42].strip() for line in lines if line.startswith("  ")}
    networks = ("student-conv", "student-vit")
    assert names == {
        *("wait for data", "copy to the device", "maps of views", "forward of teacher, frozen", "logging"),
        *("batch-norm statistics", "the rest of a step"),
        *(f"{part} of {name}" for name in networks for part in ("forward", "losses", "backward", "optimizer")),
    }
    assert sum(float(line.split()[-2]) for line in lines if line.endswith(" %")) == pytest.approx(100, abs=2)
    trace = folder / "profile" / "distill.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = [event for event in events if event.get("name") == "dpkd: the rest of a step" and event.get("ph") == "X"]
    assert len(steps) == 4
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path != trace}
    assert after == before


def test_a_stage_that_the_run_has_not_is_refused_with_those_it_has(untrained_run: Run) -> None:
    with pytest.raises(UserError, match=r"'teech'.*teach.*they are teach, distill"):
        profile(untrained_run.settings, "teech", steps=1)


def test_a_part_has_its_time_without_the_parts_inside_it() -> None:
    image_BCHW, kernel = torch.randn(8, 3, 64, 64), torch.randn(16, 3, 5, 5)
    with torch_profile() as profiled:
        for _ in range(3):
            with record_function("dpkd: outer"):
                torch.nn.functional.conv2d(image_BCHW, kernel)
                with record_function("dpkd: inner"):
                    torch.nn.functional.conv2d(image_BCHW, kernel)
    events = profiled.events()
    assert events is not None
    found = parts(events)
    whole_us = {name: sum(e.time_range.elapsed_us() for e in events if e.name == f"dpkd: {name}") for name in found}
    assert list(found) == ["outer", "inner"]
    assert found["inner"][0] == pytest.approx(whole_us["inner"])
    assert found["outer"][0] == pytest.approx(whole_us["outer"] - whole_us["inner"])
