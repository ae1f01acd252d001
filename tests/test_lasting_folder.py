"""Temporary folders of processes that live, that were killed, and that begin at the same time."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dpkd.io.temporary_folder import lasting_folder, place

ROOT = Path(__file__).resolve().parents[1]
HOLD = """
import sys, time
from dpkd.io.temporary_folder import lasting_folder
with lasting_folder(*sys.argv[1:]) as folder:
    (folder / "file").write_text("whole")
    print("up", flush=True)
    sys.stdin.read()
"""
MANY = """
import secrets
from dpkd.io.temporary_folder import lasting_folder
for _ in range(200):
    with lasting_folder("many", secrets.token_hex(8)) as folder:
        (folder / "file").write_text("whole")
        assert (folder / "file").read_text() == "whole"
"""


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def start(script: str, tmp_path: Path, *arguments: str) -> "subprocess.Popen[str]":
    """A process with the temporary folder of this test."""
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_what_a_killed_process_left_goes_and_what_a_live_one_has_stays(tmp_path: Path) -> None:
    live, killed, other = (start(HOLD, tmp_path, *each) for each in (("a", "1"), ("a", "2"), ("b", "3")))
    for process in (live, killed, other):
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
    for process in (killed, other):
        process.send_signal(signal.SIGKILL)
        process.wait()
    with lasting_folder("a", "4"):
        assert set(tmp_path.iterdir()) == {place("a", "1"), place("a", "4"), place("b", "3")}
    assert (place("a", "1") / "file").read_text() == "whole"
    live.communicate("")
    assert list(tmp_path.iterdir()) == [place("b", "3")]


def test_processes_that_begin_at_once_leave_one_another_alone(tmp_path: Path) -> None:
    processes = [start(MANY, tmp_path) for _ in range(4)]
    assert [process.wait(120) for process in processes] == [0, 0, 0, 0]
    assert not list(tmp_path.iterdir())
