"""Every kind of file of a run and its data set, damaged in every way: the command mends it, or refuses by name.

Never a wrong result without a word, a traceback, or a hang (damaged_files.py says how each outcome is told). A short
seeded part runs always, `make chaos` some hundreds, and with DPKD_CHAOS_ALL=1 every fault of every kind of file in
every state of a run.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from tests.chaos.damaged_files import CALLS, STATES, TARGETS
from tests.chaos.file_faults import FAULTS

ROOT = Path(__file__).resolve().parents[2]
SEED = int(os.environ.get("DPKD_CHAOS_SEED") or 20261125)
ALL = bool(os.environ.get("DPKD_CHAOS_ALL"))
NUM_DRAWN = 400
"""Faults where not all are tried."""
GOOD = ("went on", "mended", "refused")
NUM_CALLS = 4
"""Failing calls of each kind and state, each from another one on."""
FEW = (
    ("distilling", "checkpoint part", "swap"), ("teaching", "checkpoint manifest", "folder"),
    ("distilling", "skipped", "flip a bit"), ("teaching", "shard index", "flip a bit"),
    ("distilling", "data set manifest", "flip a bit"), ("distilling", "network weights", "truncate"),
    ("finished", "export", "delete"),
)  # fmt: skip


@pytest.fixture(scope="module")
def striking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of faults.c, compiled."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler here: the faults of storage calls are injected by a library of C")
    path = tmp_path_factory.mktemp("faults") / "faults.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", path, ROOT / "tests/chaos/faults.c", "-ldl"], check=True)
    return path


def run(library: Path, folder: Path, trials: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The outcome of each trial as it comes; what the process said stands in `<folder>.log`."""
    folder.mkdir()
    plan, log = folder.with_suffix(".json"), folder.with_suffix(".log")
    plan.write_text(json.dumps(trials))
    environment = os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.chaos.damaged_files", str(folder), str(plan)]
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        assert process.stdout is not None
        yield from map(json.loads, process.stdout)
    assert process.returncode == 0, log.read_text()[-3000:]


def check(found: Iterator[dict[str, Any]]) -> int:
    """No outcome but the good ones; reports each fault, and prints how many of each kind had which."""
    table: dict[str, Counter[str]] = {}
    wrong = []
    for each in found:
        if each["outcome"] == "absent":
            continue
        table.setdefault(each["fault"], Counter())[each["outcome"]] += 1
        report(each)
        if each["outcome"] not in GOOD:
            wrong.append(each)
    show(table)
    assert not wrong, json.dumps(wrong[:5], indent=1)
    return sum(counts.total() for counts in table.values())


def report(each: dict[str, Any]) -> None:
    """Appends a line to the file that DPKD_CHAOS_REPORT names, if any."""
    path = os.environ.get("DPKD_CHAOS_REPORT")
    if path:
        target = f"{each['target']}, {each['state']}"
        line = {"suite": "damaged files", "fault": each["fault"], "target": target}
        line["outcome"] = "survived" if each["outcome"] in GOOD else each["outcome"]
        with Path(path).open("a") as file:
            file.write(json.dumps({**line, "recovery_s": each["seconds"], "lost_steps": None}) + "\n")


def show(table: dict[str, Counter[str]]) -> None:
    """Prints faults by kind and outcome."""
    outcomes = sorted({outcome for counts in table.values() for outcome in counts})
    shown = Table("fault", *outcomes, title=f"seed {SEED}")
    for fault, counts in table.items():
        shown.add_row(fault, *(str(counts[outcome] or "") for outcome in outcomes))
    Console().print(shown)


def trials_of(places: list[tuple[str, str, str]]) -> list[dict[str, Any]]:
    draws = random.Random(SEED)
    return [
        {"state": state, "target": target, "fault": fault, "seed": draws.randrange(1 << 30)}
        for state, target, fault in places
    ]


@pytest.mark.slow
def test_a_few_damaged_files_are_mended_or_refused_by_name(striking, tmp_path):
    assert check(run(striking, tmp_path / "few", trials_of(list(FEW)))) == len(FEW)


@pytest.mark.chaos
@pytest.mark.timeout(7200)
def test_faults_of_every_kind_of_file_are_mended_or_refused_by_name(striking, tmp_path):
    places = [(state, target, fault) for state in STATES for target in TARGETS for fault in FAULTS]
    places = [place for place in places if place[:2] != ("prepared", "skipped")]  # a step is skipped once it was made
    places += [(state, "storage", call) for state in STATES for call in CALLS for _ in range(NUM_CALLS)]
    drawn = places if ALL else random.Random(SEED).sample(places, NUM_DRAWN)
    assert check(run(striking, tmp_path / "all", trials_of(drawn))) > 300
