"""What the chaos suite did: a line of JSON for every injected fault, in the file that DPKD_CHAOS_REPORT names.

{"suite": "run kills", "fault": "SIGSTOP", "target": "rank 1 of 2", "outcome": "survived", "recovery_s": 9.1,
 "lost_steps": 2}

A test that fails without having recorded what was not survived has a line too: most record after their last assert.

`tools/chaos_report.py` counts them. DPKD_CHAOS_SEED draws other faults, DPKD_CHAOS_ALL takes all where else a part is
drawn; `make chaos` sets them.
"""

import json
import os
from pathlib import Path

SURVIVED = "survived"
"""The outcome of a fault after which nothing was lost beyond what is promised; any other text says what was."""
TEST_FAILED = "test failed"
_lost_in_test: list[str] = []
"""Outcomes that the test which runs has recorded, but for those of faults that were survived."""


def seed() -> int:
    """What random faults are drawn from."""
    return int(os.environ.get("DPKD_CHAOS_SEED") or 20261125)


def all_wanted() -> bool:
    """Whether every fault is to be tried where else a part is drawn."""
    return bool(os.environ.get("DPKD_CHAOS_ALL"))


def record(
    suite: str,
    *,
    fault: str,
    target: str,
    outcome: str = SURVIVED,
    recovery_s: float | None = None,
    lost_steps: int | None = None,
) -> None:
    """Appends one fault to the report, where one is kept: what was hit, what came of it, and what it cost.

    `recovery_s` is the time from the fault to the next step or save, `lost_steps` are those that were done again.
    """
    if outcome != SURVIVED:
        _lost_in_test.append(outcome)
    path = os.environ.get("DPKD_CHAOS_REPORT")
    if not path:
        return
    line = {"suite": suite, "fault": fault, "target": target, "outcome": outcome}
    line |= {"recovery_s": None if recovery_s is None else round(recovery_s, 2), "lost_steps": lost_steps}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("a") as file:
        file.write(json.dumps(line) + "\n")


def begin_test() -> None:
    """Forgets what the test before has recorded."""
    _lost_in_test.clear()


def record_failed_test(name: str, *, phase: str) -> None:
    """Appends a test that failed in its setup, call or teardown, unless it has told by itself what was lost."""
    if not _lost_in_test:
        record(name, fault="not told", target=phase, outcome=TEST_FAILED)
