"""The chaos report shows every fault that was not survived, and every test that failed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos import report

ROOT = Path(__file__).resolve().parents[2]
TESTS = """
import pytest
from tests.chaos import report

@pytest.fixture
def broken():
    raise OSError("no such machine")

def test_survives():
    report.record("one suite", fault="SIGKILL", target="rank 0 of 2", recovery_s=2.0, lost_steps=1)

def test_fails_before_it_records():
    assert False
    report.record("one suite", fault="SIGKILL", target="rank 1 of 2")

def test_records_and_fails():
    report.record("one suite", fault="SIGSTOP", target="rank 0 of 2", outcome="the weights are others")
    assert False

def test_fails_after_one_that_recorded():
    report.record("other suite", fault="SIGKILL", target="all")
    assert False

def test_cannot_be_set_up(broken):
    pass

@pytest.mark.xfail
def test_is_known_to_fail():
    assert False
"""


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def pytest_of(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs tests as those of this repository, with the report that their faults go to."""
    (folder / "test_cases.py").write_text(text)
    arguments = ("-p", "tests.conftest", "-p", "no:cacheprovider", str(folder / "test_cases.py"))
    return run("-m", "pytest", *arguments, DPKD_CHAOS_REPORT=str(folder / "chaos.jsonl"))


@pytest.mark.nightly
def test_a_test_that_fails_is_no_fault_that_was_survived(tmp_path: Path) -> None:
    done = pytest_of(TESTS, tmp_path)
    assert "3 failed, 1 passed, 1 xfailed, 1 error" in done.stdout, done.stdout[-3000:] + done.stderr
    shown = run("tools/chaos_report.py", str(tmp_path / "chaos.jsonl"))
    assert shown.returncode == 1
    assert "| all |  | 6 | 2 | 2.0 | 2.0 | 1 |" in shown.stdout, shown.stdout
    for name in ("test_fails_before_it_records", "test_fails_after_one_that_recorded"):
        assert f"| {name} | not told | 1 | 0 |" in shown.stdout, shown.stdout
    assert "| test_cannot_be_set_up | not told | 1 | 0 |" in shown.stdout, shown.stdout
    assert "| one suite | SIGSTOP | 1 | 0 |" in shown.stdout, shown.stdout
    assert shown.stdout.count('"outcome": "test failed"') == 3


def test_where_all_was_survived_the_report_ends_well(tmp_path: Path) -> None:
    fault = {"suite": "one suite", "fault": "SIGKILL", "target": "rank 0 of 2", "outcome": report.SURVIVED}
    (tmp_path / "chaos.jsonl").write_text(json.dumps(fault | {"recovery_s": 2.0, "lost_steps": 1}))
    shown = run("tools/chaos_report.py", str(tmp_path / "chaos.jsonl"))
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "| all |  | 1 | 1 | 2.0 | 2.0 | 1 |" in shown.stdout
