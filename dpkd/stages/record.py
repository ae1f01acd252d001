"""The run folder: where everything stands, and what each stage was given and whether it is done.

runs/<name>/stages.json   {"<stage>": {"status": "running" | "done", "seconds": float, "given": {key: value}}}
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpkd import storage
from dpkd.errors import UserError


class RunFolder:
    """Paths of one run, and its record of stages."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.teacher = self.path / "teacher"
        self.live_teacher = self.path / "teacher-live"
        self.students = self.path / "students"
        self.baselines = self.path / "baselines"
        self.export = self.path / "export"
        self.tensorboard = self.path / "tb"
        self.quarantine = self.path / "quarantine.jsonl"
        self.events = self.path / "events.jsonl"
        self.hangs = self.path / "hangs"
        self._stages = self.path / "stages.json"

    def network(self, name: str) -> Path:
        """Folder of a trained network by its name in the loop: `teacher`, `student-<name>`, `baseline-<name>`.

        A teacher trained on while distilling stands apart from the one that the stage teach made.
        """
        kind, _, rest = name.partition("-")
        return {"student": self.students / rest, "baseline": self.baselines / rest, "teacher": self.live_teacher}[kind]

    def checkpoints(self, stage: str) -> Path:
        """Folder of a stage's checkpoints."""
        return self.path / "checkpoints" / stage

    def stages(self) -> dict[str, dict[str, Any]]:
        """What each stage was given, its status and its seconds over all attempts; empty before the first."""
        if not self._stages.exists():
            return {}
        try:
            record: dict[str, dict[str, Any]] = json.loads(self._stages.read_text())
        except ValueError as error:
            raise UserError(
                f"{self._stages}: not valid JSON ({error}); restore it, or start anew in another run.dir"
            ) from None
        return record

    def is_done(self, stage: str, given: dict[str, Any]) -> bool:
        """Whether the stage finished with just these settings."""
        record = self.stages().get(stage)
        return record is not None and record["status"] == "done" and record["given"] == _plain(given)

    def refuse_contradiction(self, stage: str, given: dict[str, Any]) -> None:
        """Raises `UserError` with the difference where the stage began with other settings."""
        record = self.stages().get(stage)
        if record is None or record["given"] == _plain(given):
            return
        before, now = flatten(record["given"]), flatten(_plain(given))
        lines = [
            f"  {key}: {before.get(key, '(absent)')!r} on disk, {now.get(key, '(absent)')!r} now"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]
        raise UserError(
            f"{self.path}: the stage {stage} began with other settings:\n" + "\n".join(lines) + "\n"
            "Give the old values back, choose another run.dir, or delete the run folder to start anew."
        )

    @contextmanager
    def running(self, stage: str, given: dict[str, Any]) -> Iterator[None]:
        """Records the stage as running, then as done; its seconds add up over attempts, also one that failed."""
        before = self.stages().get(stage, {}).get("seconds", 0.0)
        started = time.monotonic()
        self._write(stage, "running", before, given)
        try:
            yield
        except BaseException:
            self._write(stage, "running", before + time.monotonic() - started, given)
            raise
        self._write(stage, "done", before + time.monotonic() - started, given)

    def _write(self, stage: str, status: str, seconds: float, given: dict[str, Any]) -> None:
        record = self.stages()
        record[stage] = {"status": status, "seconds": round(seconds, 3), "given": _plain(given)}
        storage.write_bytes_atomic(str(self._stages), (json.dumps(record, indent=1) + "\n").encode())


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A tree of plain values as {dotted key: leaf}."""
    if isinstance(tree, dict) and tree:
        items = tree.items()
    elif isinstance(tree, list) and tree:
        items = enumerate(tree)  # type: ignore[assignment]
    else:
        return {prefix: tree}
    return {
        name: leaf
        for key, child in items
        for name, leaf in flatten(child, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def _plain(given: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(given))
    return plain
