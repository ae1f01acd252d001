"""Two attempts at one run at the same time, as where a cluster takes a driver for dead that was only paused.

The newer one ends as if it were alone. The older one, once it goes on, publishes nothing any more, says so and exits.
"""

import hashlib
import os
import signal
import time
from pathlib import Path

import pytest

from dpkd.run.folder import RunFolder
from dpkd.verbs.audit import audit
from tests.chaos import report
from tests.runs import Command, all_weights, tiny

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def alone(sample_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that nothing disturbed."""
    command = Command(long_run(tmp_path_factory.mktemp("alone") / "run", source=sample_folder))
    assert command.wait() == 0, command.output
    return command.folder


def long_run(folder: Path, *, source: Path):
    tree = tiny(folder, source=source)
    for part in (tree["teachers"]["teacher"], tree["distill"]):
        part["training"] |= {"steps": 40, "evaluate_every": 20, "panels_every": 40}
    tree["launcher"]["workers"] = 2
    return tree


def what_counts(folder: RunFolder) -> dict[str, str]:
    """Hash of every file that the run made, but for logs."""
    logs = ("events.jsonl", "goodput.json", "tb", "hangs", "sample_log")
    paths = [path for path in sorted(folder.path.rglob("*")) if path.is_file()]
    counting = [path for path in paths if path.relative_to(folder.path).parts[0] not in logs]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in counting}


@pytest.mark.parametrize(("paused", "stage"), [("driver", "teach"), ("all", "teach"), ("all", "distill")])
def test_a_paused_attempt_that_goes_on_changes_nothing(
    alone: RunFolder, sample_folder: Path, tmp_path: Path, paused: str, stage: str
) -> None:
    tree = long_run(tmp_path / "run", source=sample_folder)
    older = Command(tree)
    older.wait_for_step(stage, 5)
    (os.kill if paused == "driver" else os.killpg)(older.process.pid, signal.SIGSTOP)
    paused_s = time.monotonic()
    newer = Command(tree)
    assert newer.wait() == 0, newer.output
    recovery_s = time.monotonic() - paused_s
    before, printed = what_counts(newer.folder), len(newer.output)
    os.killpg(older.process.pid, signal.SIGCONT)
    code = older.wait()
    said = older.output[printed:]
    changed = dict(set(what_counts(newer.folder).items()) ^ set(before.items()))
    assert code == 2, said
    assert "at this run has begun" in said
    assert "Traceback" not in said
    assert not changed, "the paused attempt changed what the newer one had made"
    assert {record["status"] for record in newer.folder.stages().values()} == {"done"}
    audit(str(newer.folder.path))
    one, other = all_weights(alone), all_weights(newer.folder)
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)
    report.record("two attempts", fault="SIGSTOP, SIGCONT", target=paused, recovery_s=recovery_s)
