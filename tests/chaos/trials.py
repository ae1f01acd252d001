"""Many faults tried one after the other by a process of their own, in which the library of faults.c is loaded."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run(module: str, library: Path, folder: Path, trials: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The outcome of each trial as it comes from `python -m module folder FILE`; it writes to `<folder>.log`."""
    folder.mkdir()
    plan, log = folder.with_suffix(".json"), folder.with_suffix(".log")
    plan.write_text(json.dumps(trials))
    environment = os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, str(folder), str(plan)]
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        assert process.stdout is not None
        yield from map(json.loads, process.stdout)
    assert process.returncode == 0, log.read_text()[-3000:]
