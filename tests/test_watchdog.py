"""What is a hang and what is none: a watchdog beside a process that does little."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.serial

HEAD = """
import sys, time
from pathlib import Path
from dpkd.launch.heartbeat import STEADY, heartbeat, pulse
from dpkd.launch.watchdog import WatchOrder, read_hangs, watched

def steps(count, step_s):
    for step in range(count):
        heartbeat(STEADY, step=step)
        time.sleep(step_s)

order = WatchOrder(Path(sys.argv[1]), "session", 1.0)
with watched(order, rank=0):
"""


def start(folder: Path, body: str) -> subprocess.Popen[bytes]:
    """A watched process whose steps may take a second, in a process group of its own."""
    root = {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    command = [sys.executable, "-c", HEAD + f"    {body}\n", str(folder)]
    return subprocess.Popen(command, env=os.environ | root, start_new_session=True, cwd=folder)


def test_a_step_that_never_ends_is_a_hang(tmp_path: Path) -> None:
    assert start(tmp_path, "steps(2, 0); time.sleep(600)").wait(60) == -signal.SIGKILL
    report = (tmp_path / "session-rank-0.txt").read_text()
    facts = json.loads(report.partition("\n\n")[0])
    assert (facts["rank"], facts["phase"], facts["step"]) == (0, "train", 1)
    assert 'File "<string>", line ' in report


@pytest.mark.chaos
def test_storage_that_hangs_under_the_report_keeps_no_hung_worker_alive(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".session-rank-0.part")  # nobody reads it
    assert start(tmp_path, "steps(2, 0); time.sleep(600)").wait(90) == -signal.SIGKILL
    deadline_s = time.monotonic() + 20
    while _watchdog_of(tmp_path) is not None:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_other_phases_may_take_longer_and_so_may_the_step_after(tmp_path: Path) -> None:
    assert start(tmp_path, "steps(2, 0); heartbeat('evaluate'); time.sleep(3)").wait(60) == 0
    assert start(tmp_path, "heartbeat('evaluate'); steps(1, 3)").wait(60) == 0
    assert not list(tmp_path.iterdir())


def test_a_process_that_was_paused_with_its_watchdog_did_not_hang(tmp_path: Path) -> None:
    process = start(tmp_path, f"steps(2, 0); Path({str(tmp_path / 'up')!r}).touch(); steps(40, 0.1)")
    while not (tmp_path / "up").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGSTOP)
    time.sleep(4)
    os.killpg(process.pid, signal.SIGCONT)
    assert process.wait(60) == 0


def test_a_watchdog_goes_with_its_worker_and_heeds_no_signal_to_the_group(tmp_path: Path) -> None:
    process = start(tmp_path, f"Path({str(tmp_path / 'up')!r}).touch(); time.sleep(600)")
    while not (tmp_path / "up").exists():
        assert process.poll() is None
        time.sleep(0.05)
    watchdog = _watchdog_of(tmp_path)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        os.kill(watchdog, number)
    time.sleep(0.5)
    assert _watchdog_of(tmp_path) == watchdog
    process.kill()
    process.wait()
    deadline_s = time.monotonic() + 60
    while _watchdog_of(tmp_path) is not None:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def _watchdog_of(folder: Path) -> int | None:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue  # it ended meanwhile
        if "dpkd.launch.watchdog" in words and str(folder) in words:
            return int(path.parent.name)
    return None
