"""Faults at the storage calls of saves and sample logs: every next attempt finds what was saved, and ends as unbroken.

A short seeded part runs always; `make chaos` runs faults of every kind at calls that are drawn, with ALL=1 at all.
"""

import errno
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos import report
from tests.chaos.trials import run

SAMPLE_LOG = "sample_log"
KINDS = {1: "SIGKILL", 2: "SIGSTOP", 3: "SIGSEGV", 4: "exit", 5: "hang", 6: "half a write, SIGKILL"}
KINDS |= {7: "interpreter lock", 8: "SIGTERM"}
HANGS, DEATHS = (5, 7), (1, 2, 3, 4, 6)
LASTING = {100 + number: errno.errorcode[number] for number in (errno.ENOSPC, errno.EROFS, errno.EACCES)}
PASSING = {1000 + errno.EIO: "EIO once"}
NAMES = KINDS | LASTING | PASSING
NUM_DRAWN, NUM_HANGS = 80, 20
"""Faults of each kind where not all are tried; a hang has to be waited for."""


@pytest.fixture(scope="module")
def num_calls(library: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int, str], int]:
    """Storage calls of an attempt, by the number of ranks, the rank, and the folder of the run, "" for all of it."""
    places = [(size, rank, below) for below in ("", SAMPLE_LOG) for size, rank in ((1, 0), (2, 0), (2, 1))]
    trials = [{"count": 1, "size": size, "rank": rank, "below": below} for size, rank, below in places]
    found = run("tests.chaos.storage_faults", library, tmp_path_factory.mktemp("calls") / "count", trials)
    return {place: each["calls"] for place, each in zip(places, found, strict=True)}


def check(found: Iterator[dict[str, Any]]) -> int:
    """Nothing saved was lost, and what was to be survived was; reports every fault, and says how many there were."""
    survived, wrong = Counter[str](), []
    for each in found:
        name, outcome = NAMES[each["kind"]], _outcome(each)
        report.record(
            "storage calls of a save",
            fault=name,
            target=f"rank {each['rank']} of {each['size']}, call {each['call']} of {each.get('below') or 'all'}",
            outcome=outcome,
            lost_steps=each["lost_steps"],
        )
        if outcome == report.SURVIVED:
            survived[name] += 1
        else:
            wrong.append((outcome, each))
    assert not wrong, wrong[:5]
    print(f"seed {report.seed()}: {survived.total()} faults, nothing lost: {dict(survived)}")
    return survived.total()


def _outcome(each: dict[str, Any]) -> str:
    wrong = _wrong_ending(each["kind"], each["ended"], size=each["size"])
    if wrong:
        return wrong
    if not each["good"]:
        return "what was saved was lost"
    if each["misused"]:
        return "the sample logs do not say what each step used"
    return "half-written files stayed" if each["left"] else report.SURVIVED


def _wrong_ending(kind: int, ended: list[str], *, size: int) -> str | None:
    """What is wrong with how the ranks ended, none where it is what the fault must bring about."""
    whole = ended == ["exit 0"] * size
    if kind in HANGS:
        return None if ended == ["hung"] else "nothing was struck"
    if ended == ["hung"] or (len(ended) < size and set(ended) == {"exit 0"}):
        return "a rank hung"
    if kind in DEATHS:
        return "nothing was struck" if whole else None
    if kind not in LASTING:
        return None if whole else "a run that should have gone on, or saved and stopped, died"
    # a rank that loses the one that refuses ends with 1, and may be seen first
    refused = "exit 2" in ended and set(ended) <= {"exit 0", "exit 1", "exit 2"}
    return None if whole or refused else "a fault of the storage was no error of the user's"


def drawn(kind: int, place: tuple[int, int, str], *, num_calls: dict[tuple[int, int, str], int], draws: random.Random):
    """A fault of this kind at one of the calls of a place, and an attempt after it."""
    size, rank, below = place
    where = {"call": draws.randrange(num_calls[place]), "below": below, "size": size, "rank": rank}
    return {"kind": kind, **where, "next_size": draws.choice([size, 1, 2])}


@pytest.mark.nightly
def test_a_few_faults_lose_nothing_that_was_saved(library, num_calls, tmp_path):
    draws = random.Random(report.seed())
    trials = [drawn(kind, draws.choice(list(num_calls)), num_calls=num_calls, draws=draws) for kind in NAMES]
    assert check(run("tests.chaos.storage_faults", library, tmp_path / "few", trials)) == len(trials)


@pytest.mark.chaos
def test_a_fault_at_a_call_of_the_sample_log_loses_nothing(library, num_calls, tmp_path):
    draws = random.Random(report.seed())
    places = [place for place in num_calls if place[2] == SAMPLE_LOG]
    trials = [drawn(kind, place, num_calls=num_calls, draws=draws) for kind in NAMES for place in places]
    assert check(run("tests.chaos.storage_faults", library, tmp_path / "sample_log", trials)) == len(trials)


@pytest.mark.chaos
@pytest.mark.timeout(0)
@pytest.mark.parametrize("kind", NAMES, ids=[name.replace(" ", "-") for name in NAMES.values()])
def test_a_fault_at_any_call_of_a_save_loses_nothing(library, num_calls, tmp_path, kind):
    trials = [
        {"call": call, "kind": kind, "size": size, "rank": rank, "next_size": size if call % 3 else 3 - size}
        for (size, rank, below), count in num_calls.items()
        for call in range(count)
        if not below
    ]
    if not report.all_wanted():
        trials = random.Random(report.seed() + kind).sample(trials, NUM_HANGS if kind in HANGS else NUM_DRAWN)
    assert check(run("tests.chaos.storage_faults", library, tmp_path / "faults", trials)) == len(trials)
