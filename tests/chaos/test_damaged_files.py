"""Every kind of file of a run and its data set, damaged in every way: the command mends it, or refuses by name.

Never a wrong result without a word, a traceback, or a hang (damaged_files.py says how each outcome is told). A short
seeded part runs always, `make chaos` some hundreds, and with DPKD_CHAOS_ALL=1 every fault of every kind of file in
every state of a run.
"""

import json
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from tests.chaos import report
from tests.chaos.damaged_files import CALLS, STATES, TARGETS
from tests.chaos.file_faults import FAULTS
from tests.chaos.trials import run

NUM_DRAWN = 400
"""Faults where not all are tried."""
GOOD = ("went on", "mended", "refused")
NUM_CALLS = 4
"""Failing calls of each kind and state, each from another one on."""
FEW = (
    ("distilling", "checkpoint part", "swap"), ("distilling", "skipped", "flip a bit"),
    ("distilling", "network weights", "truncate"), ("finished", "events", "folder"),
    ("finished", "network weights", "empty"), ("teaching", "prior index", "flip a bit"),
)  # fmt: skip


def check(found: Iterator[dict[str, Any]]) -> int:
    """No outcome but the good ones; reports each fault, and prints how many of each kind had which."""
    table: dict[str, Counter[str]] = {}
    wrong = []
    for each in found:
        if each["outcome"] == "absent":
            continue
        table.setdefault(each["fault"], Counter())[each["outcome"]] += 1
        report.record(
            "damaged files",
            fault=each["fault"],
            target=f"{each['target']}, {each['state']}",
            outcome=report.SURVIVED if each["outcome"] in GOOD else each["outcome"],
            recovery_s=each["seconds"],
        )
        if each["outcome"] not in GOOD:
            wrong.append(each)
    show(table)
    assert not wrong, json.dumps(wrong[:5], indent=1)
    return sum(counts.total() for counts in table.values())


def show(table: dict[str, Counter[str]]) -> None:
    """Prints faults by kind and outcome."""
    outcomes = sorted({outcome for counts in table.values() for outcome in counts})
    shown = Table("fault", *outcomes, title=f"seed {report.seed()}")
    for fault, counts in table.items():
        shown.add_row(fault, *(str(counts[outcome] or "") for outcome in outcomes))
    Console().print(shown)


def trials_of(places: list[tuple[str, str, str]]) -> list[dict[str, Any]]:
    draws = random.Random(report.seed())
    return [
        {"state": state, "target": target, "fault": fault, "seed": draws.randrange(1 << 30)}
        for state, target, fault in places
    ]


@pytest.mark.nightly
@pytest.mark.slow
def test_a_few_damaged_files_are_mended_or_refused_by_name(library, tmp_path):
    assert check(run("tests.chaos.damaged_files", library, tmp_path / "few", trials_of(list(FEW)))) == len(FEW)


@pytest.mark.chaos
@pytest.mark.timeout(7200)
def test_faults_of_every_kind_of_file_are_mended_or_refused_by_name(library, tmp_path):
    places = [(state, target, fault) for state in STATES for target in TARGETS for fault in FAULTS]
    places = [place for place in places if place[:2] != ("prepared", "skipped")]  # a step is skipped once it was made
    places += [(state, "storage", call) for state in STATES for call in CALLS for _ in range(NUM_CALLS)]
    drawn = places if report.all_wanted() else random.Random(report.seed()).sample(places, NUM_DRAWN)
    assert check(run("tests.chaos.damaged_files", library, tmp_path / "all", trials_of(drawn))) > 300
