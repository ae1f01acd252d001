"""The run folder: its paths, and the inputs, status and output files of each stage.

runs/<name>/stages.json   {"<stage>": {"status": "running" | "done", "seconds": float, "given": {key: value},
                                       "made": {place: sha256}}, …, "checksum": …}; "made" only if the stage is done,
                          "from": folder, if another run did it (`run.from`)

runs/<name>/attempts/attempt-0003.json    the third attempt at the run has started (`dpkd.io.fence`)
runs/<name>/attempts/0003.tmp/            its temporary folder for stages.json and exports, which are then moved

A place is a path below the run folder, any other path, or a URL. A stage is not done if its files were changed.
An attempt that finds a newer one starts no stage, ends no stage and writes no result.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpkd.errors import UserError
from dpkd.io import storage
from dpkd.io.checkpoint_store import CheckpointStore
from dpkd.io.errors import NO_FILE, write_errors
from dpkd.io.fence import Fence
from dpkd.io.record import checked, read_record
from dpkd.log import append_json

_TEMPORARY = ".tmp"
ABSENT = "(absent)"
OFF = {json.dumps(ABSENT), "null", "false", '"none"', "[]", "{}"}
"""As JSON, the values of a setting that turns nothing on."""
KEEPS = "; with run.from={} it keeps the finished stages that are equal"
"""Of another run.dir, where the images are the same."""


class RunFolder:
    """Paths of one run, and its record of stages."""

    def __init__(self, path: str | Path, *, checkpoints: str | None = None, attempt: int | None = None) -> None:
        """Checkpoints go to the path or URL `checkpoints`, or into the run folder; `attempt` is None for a reader."""
        self.path = Path(path)
        self.attempt = attempt
        self._checkpoints = checkpoints or str(self.path / "checkpoints")
        self.live_teachers = self.path / "teachers-live"
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
        self._fence = Fence(str(self._attempts))
        self._borrowed: dict[str, dict[str, Any]] = {}

    def acquire(self) -> "RunFolder":
        """Starts a new attempt and returns its run folder; older attempts can then write no result."""
        attempt = self._fence.acquire()
        for older in self._attempts.glob(f"*{_TEMPORARY}"):
            if int(older.stem) < attempt:
                shutil.rmtree(older, ignore_errors=True)
        acquired = RunFolder(self.path, checkpoints=self._checkpoints, attempt=attempt)
        acquired._keep(self._borrowed)
        return acquired

    def check_fence(self) -> None:
        """Raises `StaleAttempt` if a newer attempt than this one has started."""
        if self.attempt is not None:
            self._fence.check(self.attempt)

    @contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """Yields an empty folder of this attempt for results that are moved to their place once they are whole.

        A newer attempt removes the folder; errors that follow are raised as `StaleAttempt`.
        """
        folder = self._attempts / f"{self.attempt or 0:04d}{_TEMPORARY}" / name
        shutil.rmtree(folder, ignore_errors=True)  # a killed worker may have left it
        try:
            with write_errors(folder):
                folder.mkdir(parents=True)
            yield folder
        except Exception:
            self.check_fence()
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def write_event(self, kind: str, **facts: Any) -> None:
        """Appends an event to `events.jsonl`, with the time and the number of this attempt."""
        attempt = {} if self.attempt is None else {"attempt": str(self.attempt)}
        append_json(self.events, {"time": round(time.time(), 3), "kind": kind, **attempt, **facts})

    def teacher(self, name: str) -> Path:
        """Folder of a teacher from the stage that trained it."""
        return self.path / "teachers" / name

    def network(self, name: str) -> Path:
        """Folder of a network by its name in distillation: `student-<name>`, `baseline-<name>`, or a live teacher's.

        A teacher that is trained during distillation has another folder than the teacher from its stage.
        """
        kind, _, rest = name.partition("-")
        parent = {"student": self.students, "baseline": self.baselines}.get(kind)
        return self.live_teachers / name if parent is None else parent / rest

    def sample_log(self, stage: str) -> Path:
        """Folder of the sample logs of a stage."""
        return self.path / "sample_log" / stage

    def skipped(self, stage: str) -> Path:
        """File of the steps that a stage skips."""
        return self.path / "skipped" / f"{stage}.json"

    def checkpoints(self, stage: str) -> str:
        """Path or URL of the checkpoints of a stage."""
        return storage.join(self._checkpoints, stage)

    def stages(self) -> dict[str, dict[str, Any]]:
        """The inputs of each stage, its status and its seconds over all attempts; empty before the first stage."""
        return self._borrowed | read_record(self._stages, way_out="restore it, or set another run.dir")

    def borrow(self, origin: "RunFolder", given: Mapping[str, dict[str, Any]], *, way_out: str) -> None:
        """Counts the stages in `given` that another run has finished as done here; `acquire` writes them.

        Raises `UserError` with the differences if one of them has other settings.
        """
        done = {stage: record for stage, record in origin.stages().items() if record["status"] == "done"}
        origin.refuse_contradictions({stage: given[stage] for stage in given if stage in done}, way_out=way_out)
        for stage in (stage for stage in given if stage in done):
            made = {origin._absolute(place): sha256 for place, sha256 in done[stage]["made"].items()}  # noqa: SLF001
            facts = {"seconds": 0.0, "made": made, "from": str(origin.path.absolute())}
            self._borrowed[stage] = done[stage] | facts

    def _keep(self, borrowed: Mapping[str, dict[str, Any]]) -> None:
        """Records borrowed stages, with copies of the networks of the other run."""
        records = {}
        for stage, record in borrowed.items():
            made, networks = dict(record["made"]), Path(record["from"]) / "teachers"
            for place in [place for place in made if Path(place).is_relative_to(networks)]:
                own = Path("teachers") / Path(place).relative_to(networks)
                storage.write_bytes_atomic(self.path / own, storage.read_bytes(place))
                made[str(own)] = made.pop(place)
            records[stage] = record | {"made": made}
        if records:
            self._record(records)

    def is_done(self, stage: str, given: dict[str, Any] | None = None) -> bool:
        """Whether the stage finished, with exactly these settings if they are given; `faults` checks its files."""
        record = self.stages().get(stage)
        is_done = record is not None and record["status"] == "done"
        return is_done and (given is None or not _differences(self.stages()[stage]["given"], given))

    def bound(self, stages: Iterable[str]) -> set[str]:
        """The training stages among `stages` that have finished or saved a checkpoint, so that their settings stay."""
        records = self.stages()
        return {
            stage
            for stage in stages
            if stage in records
            and (records[stage]["status"] == "done" or CheckpointStore(self.checkpoints(stage)).committed())
        }

    def faults(self, stage: str) -> list[str]:
        """Faults of the files of a finished stage, each of which is read; none for an unfinished stage."""
        record = self.stages().get(stage, {})
        faults = []
        for place, sha256 in record["made"].items() if record.get("status") == "done" else ():
            file = self._absolute(place)
            try:
                if storage.sha256(file) != sha256:
                    faults.append(f"{file} was changed or damaged")
            except NO_FILE:
                faults.append(f"{file} is missing")
        return faults

    def _absolute(self, place: str) -> str:
        return place if storage.local_path(place) is None else str(self.path.absolute() / place)

    def refuse_contradictions(self, given: Mapping[str, dict[str, Any]], *, way_out: str | None = None) -> None:
        """Raises `UserError` with the differences, and their stages, if stages in `given` began with other settings."""
        records, stages_of = self.stages(), dict[str, list[str]]()
        for stage in (stage for stage in given if stage in records):
            for key, was, is_now in _differences(records[stage]["given"], given[stage]):
                stages_of.setdefault(f"  {key}: {was!r} on disk, {is_now!r} now", []).append(stage)
        if stages_of:
            lines = [f"{difference} ({', '.join(stages)})" for difference, stages in stages_of.items()]
            keeps = "" if any("pack" in stages for stages in stages_of.values()) else KEEPS.format(self.path)
            other_ways = (
                f"Restore the old values, or set another run.dir{keeps}. Or delete the run folder to start again."
            )
            raise UserError(
                f"{self._stages}: stages of this run began with other settings:\n" + "\n".join(lines) + "\n"
                f"{way_out or other_ways}"
            )

    @contextmanager
    def running(
        self, stage: str, given: dict[str, Any], *, makes: Callable[[], Iterable[str | Path]] = tuple
    ) -> Iterator[None]:
        """Records the stage as running during the body, then as done; its seconds add up over all attempts.

        Failed attempts count too. An attempt also writes `stage_began` and `stage_ended` to `events.jsonl`. After the
        body `makes` returns the files of the stage. Raises `StaleAttempt` if a newer attempt has started.
        """
        before = self.stages().get(stage, {})
        before_s, began_s = before.get("seconds", 0.0), time.monotonic()
        if before and _differences(before["given"], given):  # it saved nothing with the earlier settings
            shutil.rmtree(self.sample_log(stage), ignore_errors=True)

        def write(status: str, **facts: Any) -> None:
            seconds = round(before_s + time.monotonic() - began_s, 3)
            self._record({stage: {"status": status, "seconds": seconds, "given": given, **facts}})

        write("running")
        if self.attempt is not None:
            self.write_event("stage_began", stage=stage)
        try:
            yield
        except BaseException:
            write("running")
            raise
        made = {}
        for file in makes():
            path, place = storage.local_path(file), str(file)
            if path is not None:
                place = str(path.relative_to(self.path) if path.is_relative_to(self.path) else path.absolute())
            made[place] = storage.sha256(file)
        write("done", made=made)
        if self.attempt is not None:
            self.write_event("stage_ended", stage=stage)

    def reopen(self, stages: Iterable[str]) -> None:
        """Records the finished stages among `stages` as running, so that they run again."""
        done = {stage: record for stage, record in self.stages().items() if record["status"] == "done"}
        again = {stage: {key: done[stage][key] for key in ("seconds", "given")} for stage in stages if stage in done}
        if again:
            self._record({stage: {"status": "running", **record} for stage, record in again.items()})

    def _record(self, stages: dict[str, Any]) -> None:
        """Replaces the records of these stages; raises `StaleAttempt` if a newer attempt has started."""
        self.check_fence()
        data = checked(self.stages() | stages)
        with self.scratch("record") as folder, write_errors(self._stages):
            (folder / self._stages.name).write_bytes(data)
            storage.sync(folder / self._stages.name)  # slow storage may take long: a newer attempt may have started
            self.check_fence()
            storage.deliver(folder / self._stages.name, self._stages)


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """The dotted key and both values of each leaf that differs; a leaf that is off is equal to a missing one.

    So a run goes on under a later version of dpkd, if the settings that it adds are off by default.
    """
    trees = _leaves(before), _leaves(json.loads(json.dumps(now)))
    rows = [(key, *(tree.get(key, ABSENT) for tree in trees)) for key in sorted(trees[0].keys() | trees[1].keys())]
    return [row for row in rows if row[1] != row[2] and not (ABSENT in row and {*map(json.dumps, row[1:])} <= OFF)]


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of a tree of plain values, as {dotted key: leaf}."""
    if not isinstance(tree, dict | list) or not tree:
        return {prefix: tree}
    leaves: dict[str, Any] = {}
    for key, child in tree.items() if isinstance(tree, dict) else enumerate(tree):
        leaves |= _leaves(child, f"{prefix}.{key}" if prefix else str(key))
    return leaves
