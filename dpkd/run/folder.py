"""The run folder: where everything stands, what each stage was given, whether it is done, and what it made.

runs/<name>/stages.json   {"<stage>": {"status": "running" | "done", "seconds": float, "given": {key: value},
                                       "made": {place: sha256}}}      of a stage that is done

runs/<name>/attempts/0003       empty; the third attempt at the run has begun
runs/<name>/attempts/0003.tmp/  where it writes stages.json and exports before it puts them in their place

A place is a path below the run folder, any other path, or a URL. A file that is no longer what the stage made would
else be taken for its result, so such a stage is not done.

Two attempts may overlap, as when a cluster takes a driver for dead that was only cut off. Each claims a number, and one
that finds a newer number neither begins a stage, nor ends one, nor writes a result. One that was stopped between
looking and writing finds its temporary folder gone, which the newer one removed before it read anything. Checkpoints
are claimed stage by stage (`train.checkpoint_store`), because they may stand in another place.
"""

import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dpkd.errors import StorageError, UserError
from dpkd.io import storage
from dpkd.io.checkpoint_store import Superseded
from dpkd.io.errors import NO_FILE, write_errors
from dpkd.io.untrusted import parse_json
from dpkd.log import EventLog

_TEMPORARY = ".tmp"


class RunFolder:
    """Paths of one run, and its record of stages; `checkpoints` is a path or URL, none takes a folder of the run's."""

    def __init__(self, path: str | Path, *, checkpoints: str | None = None, attempt: int | None = None) -> None:
        """`attempt` is the number of the one that writes here; none reads alone, or is no run."""
        self.path = Path(path)
        self.attempt = attempt
        self._checkpoints = checkpoints or str(self.path / "checkpoints")
        self.teacher = self.path / "teacher"
        self.live_teacher = self.path / "teacher-live"
        self.students = self.path / "students"
        self.baselines = self.path / "baselines"
        self.export = self.path / "export"
        self.tensorboard = self.path / "tb"
        self.quarantine = self.path / "quarantine.jsonl"
        self.events = self.path / "events.jsonl"
        self.goodput = self.path / "goodput.json"
        self.hangs = self.path / "hangs"
        self._stages = self.path / "stages.json"
        self._attempts = self.path / "attempts"

    def claimed(self) -> "RunFolder":
        """The same folder for a new attempt: from here on older ones write no result."""
        while True:
            attempt = self._newest() + 1
            if storage.create(self._attempts / f"{attempt:04d}"):
                for name in storage.list_names(self._attempts):
                    number, dot, rest = name.partition(".")
                    if dot + rest == _TEMPORARY and int(number) <= attempt:  # a newer one may have begun meanwhile
                        self._take_away(name)
                with write_errors(self._attempts):
                    (self._attempts / f"{attempt:04d}{_TEMPORARY}").mkdir()
                return RunFolder(self.path, checkpoints=self._checkpoints, attempt=attempt)

    def _take_away(self, name: str) -> None:
        """Removes an older attempt's folder, in which that one may still be at work."""
        aside = self._attempts / f"{storage.TEMPORARY_PREFIX}{uuid.uuid4().hex}"
        with write_errors(self._attempts), suppress(FileNotFoundError):
            (self._attempts / name).rename(aside)
        shutil.rmtree(aside, ignore_errors=True)

    def refuse_superseded(self) -> None:
        """Raises `Superseded` where a newer attempt than this one has begun."""
        newest = self._newest()
        if self.attempt is not None and newest > self.attempt:
            place = self._attempts / f"{newest:04d}"
            raise Superseded(
                f"attempt {newest} at this run has begun ({place}), so attempt {self.attempt} stops here and has "
                "written no result since; let one of them run, or choose another run.dir"
            )

    @contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """An empty folder of this attempt's own in the body, for what is put in its place once it is whole.

        A newer attempt removes it as it begins; whatever error that leads to, `Superseded` is raised.
        """
        folder = self._own_folder / name
        shutil.rmtree(folder, ignore_errors=True)  # a worker that was killed left it
        try:
            folder.mkdir(parents=self.attempt is None)
            yield folder
        except Exception:
            self.refuse_superseded()
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @property
    def _own_folder(self) -> Path:
        return self._attempts / f"{self.attempt or 0:04d}{_TEMPORARY}"

    def _newest(self) -> int:
        return max((int(name) for name in storage.list_names(self._attempts) if name.isdecimal()), default=0)

    def event_log(self) -> EventLog:
        """Where what happens is written down, as of this attempt."""
        return EventLog(self.events, attempt=None if self.attempt is None else str(self.attempt))

    def network(self, name: str) -> Path:
        """Folder of a trained network by its name in the loop: `teacher`, `student-<name>`, `baseline-<name>`.

        A teacher trained on while distilling stands apart from the one that the stage teach made.
        """
        kind, _, rest = name.partition("-")
        return {"student": self.students / rest, "baseline": self.baselines / rest, "teacher": self.live_teacher}[kind]

    def sample_log(self, stage: str) -> Path:
        """Folder of the logs of the samples that a stage used."""
        return self.path / "sample_log" / stage

    def skipped(self, stage: str) -> Path:
        """The file of the steps that a stage passes over."""
        return self.path / "skipped" / f"{stage}.json"

    def checkpoints(self, stage: str) -> str:
        """Where a stage's checkpoints stand."""
        return storage.join(self._checkpoints, stage)

    def stages(self) -> dict[str, dict[str, Any]]:
        """What each stage was given, its status and its seconds over all attempts; empty before the first."""
        try:
            return _read(storage.read_bytes(self._stages))
        except FileNotFoundError:
            return {}
        except (*NO_FILE, ValueError) as error:
            raise UserError(
                f"{self._stages} is not the record of a run ({error}); restore it, or start anew in another run.dir"
            ) from None

    def is_done(self, stage: str, given: dict[str, Any]) -> bool:
        """Whether the stage finished with just these settings, and what it made still stands."""
        record = self.stages().get(stage)
        finished = record is not None and record["status"] == "done" and record["given"] == _plain(given)
        return finished and not self.faults(stage)

    def faults(self, stage: str) -> list[str]:
        """What is wrong with the files that the stage made when it was done; nothing before. Reads them all."""
        record = self.stages().get(stage, {})
        made = record.get("made", {}) if record.get("status") == "done" else {}  # an earlier dpkd kept no list
        return [fault for place, sha256 in made.items() if (fault := self._fault(place, sha256)) is not None]

    def _fault(self, place: str, sha256: str) -> str | None:
        where = self.path / place if storage.local_path(place) is not None else place
        try:
            return None if storage.sha256(where) == sha256 else f"{where} was changed or damaged"
        except NO_FILE:
            return f"{where} is missing"

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
            f"{self._stages}: the stage {stage} began with other settings:\n" + "\n".join(lines) + "\n"
            "Give the old values back, choose another run.dir, or delete the run folder to start anew."
        )

    @contextmanager
    def running(
        self, stage: str, given: dict[str, Any], *, makes: Callable[[], Iterable[str | Path]] = tuple
    ) -> Iterator[None]:
        """Records the stage as running, then as done; its seconds add up over attempts, also one that failed.

        `makes` tells, once it is done, the files that it made. Raises `Superseded` where a newer attempt has begun.
        """
        before = self.stages().get(stage, {}).get("seconds", 0.0)
        started = time.monotonic()
        self._write(stage, "running", before, given)
        try:
            yield
        except BaseException:
            self._write(stage, "running", before + time.monotonic() - started, given)
            raise
        made = {self._place(where): storage.sha256(where) for where in makes()}
        self._write(stage, "done", before + time.monotonic() - started, given, made=made)

    def _place(self, where: str | Path) -> str:
        path = storage.local_path(where)
        below = path is not None and path.is_relative_to(self.path)
        return str(where) if path is None else str(path.relative_to(self.path) if below else path.absolute())

    def _write(
        self, stage: str, status: str, seconds: float, given: dict[str, Any], *, made: dict[str, str] | None = None
    ) -> None:
        self.refuse_superseded()
        record = self.stages()
        record[stage] = {"status": status, "seconds": round(seconds, 3), "given": _plain(given)}
        if made is not None:
            record[stage]["made"] = made
        data = (json.dumps(record, indent=1) + "\n").encode()
        if self.attempt is None:
            storage.write_bytes_atomic(self._stages, data)
            return
        beside = self._own_folder / self._stages.name
        try:
            with write_errors(self._stages):
                beside.write_bytes(data)
                storage.deliver(beside, self._stages)
        except StorageError:
            self.refuse_superseded()
            raise


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
    """As JSON holds it."""
    plain: dict[str, Any] = json.loads(json.dumps(given))
    return plain


def _read(data: bytes) -> dict[str, dict[str, Any]]:
    record = parse_json(data)
    if not isinstance(record, dict):
        raise ValueError("it holds no stages")  # noqa: TRY004 (a fault of the file)
    for stage, entry in record.items():
        kinds = {"status": str, "seconds": int | float, "given": dict}
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), kind) for key, kind in kinds.items()):
            raise ValueError(f"the stage {stage} has no status, seconds and settings given")
        made = entry.get("made", {})
        if not isinstance(made, dict) or not all(isinstance(sha256, str) for sha256 in made.values()):
            raise ValueError(f"the files that the stage {stage} made are no names with checksums")
    return record
