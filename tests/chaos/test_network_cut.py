"""The network between two machines is cut in the middle of steps and of saves: nothing hangs, and nothing is lost."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dpkd.run.attempt import write_provenance
from dpkd.run.folder import RunFolder
from dpkd.verbs.audit import audit
from tests.chaos import report
from tests.runs import Command, all_weights, settings_of, tiny

ROOT = Path(__file__).resolve().parents[2]
STEPS, CALLS_OF_A_SAVE = 120, 60
SAVED_EVERY = 5
MOST_UNSAVED = 2 * SAVED_EVERY
"""Steps since the last published save, at most: a save is waited for when the next one is due."""


def _refused() -> str | None:
    """Why there can be no network namespaces here; none where there can."""
    try:
        done = subprocess.run(["unshare", "-rn", "ip", "link"], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        return str(error)
    return done.stderr.strip() or "refused" if done.returncode else None


def tree_of(folder: Path, *, source: Path | None, shards: Path | None = None) -> dict[str, Any]:
    tree = tiny(folder, source=source, shards=shards)
    tree["teachers"]["teacher"]["training"] |= {"steps": STEPS, "evaluate_every": STEPS, "panels_every": STEPS}
    tree["teachers"]["teacher"]["training"]["checkpoint_every"] = SAVED_EVERY
    tree["launcher"]["workers"] = 2
    return tree


@pytest.fixture(scope="module")
def unbroken(sample_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of two workers whose connection held."""
    tree = tree_of(tmp_path_factory.mktemp("whole") / "run", source=sample_folder)
    command = Command(tree, "--stages", "pack,prepare,teach")
    assert command.wait() == 0, command.output
    return command.folder


def draw(num_cuts: int) -> list[dict[str, Any]]:
    """Cuts at every tenth step or in the next save of a rank; most last, some are mended soon."""
    draws = random.Random(report.seed())
    return [
        {
            "step": 10 * number,
            "in_save": number % 2 == 0,
            "rank": draws.randrange(2),
            "call": draws.randrange(CALLS_OF_A_SAVE),
            "for_s": 1.5 if number % 3 == 0 else None,
        }
        for number in range(1, num_cuts + 1)
    ]


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_a_cut_network_is_noticed_and_the_run_goes_on_bit_equal(
    unbroken: RunFolder, library: Path, tmp_path: Path
) -> None:
    reason = _refused()
    if reason is not None:
        pytest.skip(f"no network namespaces here ({reason})")
    tree = tree_of(tmp_path / "run", source=None, shards=unbroken.path / "shards")
    folder = RunFolder(tmp_path / "run")
    write_provenance(folder, settings_of(tree).model_dump(mode="json"))
    config, cuts = tmp_path / "settings.json", tmp_path / "cuts.json"
    config.write_text(json.dumps(tree))
    cuts.write_text(json.dumps(draw(10)))
    environment = os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = ["unshare", "-rn", sys.executable, "-m", "tests.chaos.network_cut", str(config), str(cuts)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    log = config.with_suffix(".log")
    assert done.returncode == 0, done.stderr[-3000:] + (log.read_text()[-3000:] if log.exists() else "")
    *told, end = map(json.loads, done.stdout.splitlines())
    assert end["codes"] == [0, 0]
    audit(str(folder.path))
    one, other = all_weights(unbroken), all_weights(folder)
    teacher = {name: weight for name, weight in one.items() if name.startswith("teachers/")}
    assert teacher.keys() == other.keys()
    assert all(teacher[name].equal(other[name]) for name in teacher)
    for each in told:
        lasting = each["for_s"] is None
        noticed = each["codes"] == [None, None] if not lasting else None not in each["codes"]
        bounded = each["lost_steps"] <= each["unsaved_steps"] <= MOST_UNSAVED
        report.record(
            "network of two machines",
            fault=f"{'cut' if lasting else 'cut for 1.5 s'} in a {'save' if each['in_save'] else 'step'}",
            target=f"rank {each['rank']} of 2" if each["in_save"] else "both",
            outcome=report.SURVIVED if noticed and bounded else "not noticed, or more lost than was unsaved",
            recovery_s=each.get("recovery_s", each["seconds"]),
            lost_steps=each["lost_steps"],
        )
        assert noticed, each
        assert bounded, each
        assert each["seconds"] < 120, each
