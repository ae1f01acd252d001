"""What the driver of a run writes of an attempt: with what it is made, that it lives, restarts, where the time goes."""

import json
import platform
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from dpkd.errors import StopRequested
from dpkd.io import storage
from dpkd.io.checkpoint_store import CheckpointStore
from dpkd.launch.worker_group import Restart, Supervision
from dpkd.log import EventReader, logger
from dpkd.report.goodput import TimeAccount
from dpkd.run.folder import RunFolder

ALIVE_S = 30.0
"""Seconds between two `alive` events of a driver: a kill of everything leaves at most so much unaccounted."""
PACKAGES = ("dpkd", "torch", "torchvision", "timm", "deepspeed", "ray", "numpy", "opencv-contrib-python-headless")


def write_provenance(folder: RunFolder, settings: dict[str, Any]) -> None:
    """Writes `settings.yaml`, every default filled in, and `versions.json` with the git commit that dpkd runs from."""
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    storage.write_bytes_atomic(folder.path / "settings.yaml", text.encode())
    commit = None
    try:
        describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
        commit = subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        pass  # no checkout
    installed = {package.metadata["Name"].lower(): package.version for package in metadata.distributions()}
    versions: dict[str, str | None] = {"python": platform.python_version(), "platform": platform.platform()}
    versions |= {name: installed.get(name) for name in PACKAGES} | {"git": commit}
    storage.write_bytes_atomic(folder.path / "versions.json", (json.dumps(versions, indent=1) + "\n").encode())


class Attempt:
    """One submission of a run, with its own number in `events.jsonl`; `goodput.json` is kept up to date."""

    def __init__(self, folder: RunFolder) -> None:
        self.events = folder.event_log()
        self._goodput = folder.goodput
        self._reader, self._account = EventReader(folder.events), TimeAccount()
        self._writing = threading.Lock()

    def write(self, kind: str, **facts: Any) -> None:
        """Appends an event and writes the account until now; where that fails, the run goes on."""
        try:
            with self._writing:
                self.events.write(kind, **facts)
                self._account.add(self._reader.new())
                table = self._account.table() | {"torn_events": self._reader.num_torn}
                storage.write_bytes_atomic(self._goodput, (json.dumps(table, indent=1) + "\n").encode())
        except OSError as error:
            logger.info(f"where the time went could not be written: {error}")


@contextmanager
def attempt_at(folder: RunFolder, stages: Sequence[str]) -> Iterator[Attempt]:
    """An attempt at these stages, until the block ends."""
    attempt, ended = Attempt(folder), threading.Event()
    attempt.events.write("attempt_began", stages=list(stages))

    def keep_alive() -> None:
        while not ended.wait(ALIVE_S):
            attempt.write("alive")

    threading.Thread(target=keep_alive, name="dpkd-alive", daemon=True).start()
    status = "failed"
    try:
        yield attempt
        status = "done"
    except (StopRequested, KeyboardInterrupt):
        status = "stopped"
        raise
    finally:
        ended.set()
        attempt.write("attempt_ended", status=status)


def supervision(folder: RunFolder, attempt: Attempt) -> Supervision:
    """Reports of hangs go to `<run>/hangs`, restarts to `events.jsonl`; a stage done or a checkpoint is progress."""

    def progress() -> tuple[int, ...]:
        stages = folder.stages()
        running = [name for name, record in stages.items() if record["status"] != "done"]
        steps = [saved.step for name in running for saved in CheckpointStore(folder.checkpoints(name)).committed()]
        return len(stages) - len(running), max(steps, default=0)

    def on_restart(restart: Restart) -> None:
        since_failure_s = round(restart.since_failure_s, 3)
        attempt.write("restart", rank=restart.rank, cause=restart.cause, since_failure_s=since_failure_s)

    return Supervision(hangs=folder.hangs, progress=progress, on_restart=on_restart)
