"""A run goes on at any world size, with any engine: bit for bit at the same, within 1e-6 of the unbroken at another.

Teacher and student stand in engines of their own, with four parameter groups that differ in learning rate and weight
decay, a frozen parameter, averaged weights and batch norm; 24 steps, saved by real checkpoints, stopped and killed on
the way (world_sizes.py). Compared is all that a checkpoint holds: weights, statistics, averages, the optimizer's state.
A part runs always; `make chaos` runs every stage over more ways.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.chaos import report
from tests.engine_cases import STAGE

ROOT = Path(__file__).resolve().parents[2]
NEAR = 1e-6
"""Largest absolute difference at another world size: sums in fp32 are taken in another order."""
LAST = 24
KINDS = tuple(STAGE)
PAIRS = (("torch", "torch"), ("zero3", "zero1"), ("zero1", "zero2"), ("zero0", "zero3"), ("zero2", "zero0"))
WAYS = ((1, 2, 3, 1), (2, 3), (3, 2), (1, 3, 2), (3, 1, 2, 3), (2, 1))


def run(folder: Path, trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What came of each trial."""
    folder.mkdir()
    plan, log = folder / "plan.json", folder / "log"
    plan.write_text(json.dumps(trials))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("w") as errors:
        done = subprocess.run(
            [sys.executable, "-m", "tests.train.world_sizes", str(folder), str(plan)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            check=False,
        )
    assert done.returncode == 0, log.read_text()[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def way(sizes: tuple[int, ...], engines: list[tuple[str, str]], *, kills: tuple[int, ...] = ()) -> dict[str, Any]:
    """A trial through these world sizes, with the engines of each segment; the segments in `kills` are killed."""
    ends = [LAST * (place + 1) // len(sizes) for place in range(len(sizes))]
    segments = [
        {"size": size, "engines": pair, "end": end, "kill": place in kills}
        for place, (size, pair, end) in enumerate(zip(sizes, engines, ends, strict=True))
    ]
    return {"segments": segments, "unbroken": {"size": sizes[0], "engines": engines[0]}}


def assert_as_unbroken(trials: list[dict[str, Any]], found: list[dict[str, Any]]) -> None:
    """Bit for bit where neither size nor engines changed, near elsewhere; each sample as ordered; says how near."""
    furthest: dict[str, float] = {}
    for trial, each in zip(trials, found, strict=True):
        same = len({(segment["size"], *segment["engines"]) for segment in trial["segments"]}) == 1
        assert (each["as_ordered"], each["passed"], each["attempts"]) == (True, True, len(trial["segments"])), each
        assert each["equal"] if same else max(each["off"].values()) <= NEAR, (trial, each)
        for before, after in itertools.pairwise(trial["segments"]):
            where = f"{before['size']} to {after['size']} workers, {' and '.join(after['engines'])}"
            report.record("world sizes", fault="killed" if before["kill"] else "stopped", target=where)
        for kind, off in each["off"].items():
            furthest[kind] = max(furthest.get(kind, 0.0), off)
    print(f"{len(trials)} ways; furthest from the unbroken run: {furthest}")


def poisoned(pair: tuple[str, str], network: str, *, factor: str = "nan", step: int = 8) -> dict[str, Any]:
    """A trial in which one of two ranks' loss of one network is so many times itself at one step."""
    segment = {"size": 2, "engines": pair, "end": LAST}
    poison = {"step": step, "rank": 1, "network": network, "factor": factor}
    return {"segments": [segment | {"poison": poison}], "unbroken": {"size": 2, "engines": pair, "skipped": [step]}}


def assert_passed_over(trials: list[dict[str, Any]], found: list[dict[str, Any]]) -> None:
    """All ranks went back and passed over the step, and all is as if it had never been."""
    for trial, each in zip(trials, found, strict=True):
        skipped = trial["unbroken"]["skipped"]
        assert (each["skipped"], each["attempts"], each["as_ordered"], each["equal"]) == (skipped, 2, True, True), trial
        fault = f"loss x {trial['segments'][0]['poison']['factor']} on one rank"
        report.record("poisoned steps", fault=fault, target=" and ".join(trial["unbroken"]["engines"]))


def passes(places: list[tuple[int, str]]) -> list[dict[str, Any]]:
    """Segments that load and save, with so many ranks and this kind of engine for both networks."""
    return [{"size": size, "engines": (kind, kind), "end": LAST} for size, kind in places]


@pytest.mark.nightly
@pytest.mark.slow
def test_a_run_goes_on_at_other_world_sizes(tmp_path: Path) -> None:
    trial = way((1, 2, 3), [("zero3", "zero1")] * 3, kills=(1,))
    assert_as_unbroken([trial], run(tmp_path / "few", [trial | {"passes": passes([(2, "zero2")])}]))


@pytest.mark.nightly
@pytest.mark.slow
def test_all_ranks_pass_over_a_step_that_is_spoilt_on_one(tmp_path: Path) -> None:
    trials = [poisoned(("torch", "zero3"), "teacher")]
    assert_passed_over(trials, run(tmp_path / "few", trials))


@pytest.mark.slow
@pytest.mark.nightly
def test_a_run_goes_on_with_other_stages_at_other_world_sizes(tmp_path: Path) -> None:
    trials = [way((1, 3, 2), [("zero2", "zero0")] * 3, kills=(0,)), way((2,) * 3, [("zero0", "zero2")] * 3, kills=(1,))]
    assert_as_unbroken(trials, run(tmp_path / "few", trials))


@pytest.mark.chaos
def test_a_spoilt_step_is_passed_over_with_every_engine(tmp_path: Path) -> None:
    trials = [poisoned((kind, kind), network) for kind in KINDS for network in ("teacher", "student")]
    trials += [poisoned((kind, kind), "teacher", factor="1e9", step=18) for kind in KINDS]  # clipped, but told
    assert_passed_over(trials, run(tmp_path / "all", trials))


@pytest.mark.chaos
@pytest.mark.timeout(7200)
def test_every_stage_goes_on_over_every_way(tmp_path: Path) -> None:
    trials = [
        way(sizes, [pair] * len(sizes), kills=(len(sizes) - 2,)) for sizes, pair in itertools.product(WAYS, PAIRS)
    ]
    trials += [way((size,) * 3, [pair] * 3, kills=(0,)) for size, pair in itertools.product((1, 2, 3), PAIRS)]
    trials += [
        way((1, 2, 3), [(KINDS[k], KINDS[k - 1]), (KINDS[k - 2], KINDS[k]), (KINDS[k - 1], KINDS[k - 3])])
        for k in range(len(KINDS))
    ]
    trials += [each | {"student": "sgd"} for each in trials[:: len(PAIRS) - 1]]
    trials[0]["passes"] = passes([(size, kind) for size in (3, 1, 2) for kind in KINDS])
    assert_as_unbroken(trials, run(tmp_path / "all", trials))
