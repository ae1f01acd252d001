"""Faults at the storage calls of a save: every next attempt finds what was saved, and ends as an unbroken run.

A short seeded part runs always; `make chaos` runs a fault of every kind at every call.
"""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
KINDS = {1: "SIGKILL", 2: "SIGSTOP", 3: "SIGSEGV", 4: "exit", 5: "hang", 6: "half a write, SIGKILL"}
LASTING = {100 + number: errno.errorcode[number] for number in (errno.ENOSPC, errno.EROFS, errno.EACCES)}
PASSING = {1000 + errno.EIO: "EIO once"}
SEED = 20261125


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler here: the faults of storage calls are injected by a library of C")
    path = tmp_path_factory.mktemp("faults") / "faults.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", path, ROOT / "tests/chaos/faults.c", "-ldl"], check=True)
    return path


def run(library: Path, folder: Path, trials: list[dict[str, int]]) -> list[dict[str, Any]]:
    """The outcome of each trial; what the processes said stands in `<folder>.log`."""
    folder.mkdir()
    plan = folder.with_suffix(".json")
    plan.write_text(json.dumps(trials))
    environment = os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with folder.with_suffix(".log").open("w") as log:
        done = subprocess.run(
            [sys.executable, "-m", "tests.chaos.storage_faults", str(folder), str(plan)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            check=False,
        )
    assert done.returncode == 0, folder.with_suffix(".log").read_text()[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def num_calls(library: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], int]:
    """Storage calls of an attempt, by the number of ranks and the rank."""
    places = [(1, 0), (2, 0), (2, 1)]
    found = run(
        library,
        tmp_path_factory.mktemp("calls") / "count",
        [{"count": 1, "size": size, "rank": rank} for size, rank in places],
    )
    return {place: each["calls"] for place, each in zip(places, found, strict=True)}


def check(found: list[dict[str, Any]]) -> None:
    """Nothing saved was lost, and what was to be survived was; says how many faults there were of each kind."""
    names = KINDS | LASTING | PASSING
    lost = [each for each in found if not each["good"]]
    assert not lost, lost[:5]
    died = [each for each in found if each["kind"] in PASSING and each["ended"] != ["exit 0"] * each["size"]]
    assert not died, died[:5]
    untidy = [each for each in found if each["kind"] in LASTING and "exit 1" in each["ended"][:1]]
    assert not untidy, untidy[:5]
    survived = Counter(names[each["kind"]] for each in found)
    print(f"seed {SEED}: {len(found)} faults, nothing lost: {dict(survived)}")


def test_a_few_faults_lose_nothing_that_was_saved(library, num_calls, tmp_path):
    draws = random.Random(SEED)
    trials = []
    for kind in [*KINDS, *LASTING, *PASSING] * 3:
        size, rank = draws.choice(list(num_calls))
        call = draws.randrange(num_calls[size, rank])
        trials.append({"call": call, "kind": kind, "size": size, "rank": rank, "next_size": draws.choice([size, 1, 2])})
    check(run(library, tmp_path / "few", trials))


@pytest.mark.chaos
@pytest.mark.timeout(3000)
def test_a_fault_of_every_kind_at_every_call_of_a_save_loses_nothing(library, num_calls, tmp_path):
    trials = [
        {"call": call, "kind": kind, "size": size, "rank": rank, "next_size": size if call % 3 else 3 - size}
        for (size, rank), count in num_calls.items()
        for kind in [*KINDS, *LASTING, *PASSING]
        for call in range(0, count, 6 if kind == 5 else 1)  # a hang is waited for
    ]
    found = run(library, tmp_path / "all", trials)
    assert len(found) == len(trials) > 1000
    check(found)
