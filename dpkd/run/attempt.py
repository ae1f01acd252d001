"""Records of an attempt, written by the driver of a run: settings, versions, signs of life, restarts, goodput."""

import json
import platform
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
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
"""Seconds between two `alive` events of a driver, and the most time that the account misses after a kill."""
PACKAGES = ("dpkd", "torch", "torchvision", "timm", "deepspeed", "ray", "numpy", "opencv-contrib-python-headless")


def write_provenance(folder: RunFolder, settings: dict[str, Any], *, chosen: str | None = None) -> None:
    """Writes `settings.yaml` with all defaults, and `versions.json` with the git commit of dpkd.

    Chosen settings, as text with their reasons, are written to `chosen.yaml`.
    """
    if chosen is not None:
        storage.write_bytes_atomic(folder.path / "chosen.yaml", chosen.encode())
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    storage.write_bytes_atomic(folder.path / "settings.yaml", text.encode())
    versions: dict[str, str | None] = {"python": platform.python_version(), "platform": platform.platform()}
    versions |= dict.fromkeys((*PACKAGES, "git"))
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    with suppress(OSError, subprocess.CalledProcessError):  # dpkd is not in a git checkout
        describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
        versions["git"] = subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    storage.write_bytes_atomic(folder.path / "versions.json", (json.dumps(versions, indent=1) + "\n").encode())


@contextmanager
def attempt_at(folder: RunFolder, stages: Sequence[str]) -> Iterator[Supervision]:
    """Records the body as an attempt at these stages; yields the supervision of its training stages.

    Each attempt has a number in `events.jsonl`. `goodput.json` is kept up to date; the run continues if that fails.
    Hangs are reported to `<run>/hangs`, restarts to `events.jsonl`. A finished stage or a new checkpoint is progress.
    """
    reader, account = EventReader(folder.events), TimeAccount()
    writing, ended = threading.Lock(), threading.Event()

    def write(kind: str, **facts: Any) -> None:
        try:
            with writing:
                folder.write_event(kind, **facts)
                account.add(reader.new())
                table = account.table() | {"torn_events": reader.num_torn}
                storage.write_bytes_atomic(folder.goodput, (json.dumps(table, indent=1) + "\n").encode())
        except OSError as error:
            logger.info(f"goodput of the run could not be written: {error}")

    def keep_alive() -> None:
        while not ended.wait(ALIVE_S):
            write("alive")

    def progress() -> tuple[int, ...]:
        records = folder.stages()
        running = [name for name, record in records.items() if record["status"] != "done"]
        steps = [saved.step for name in running for saved in CheckpointStore(folder.checkpoints(name)).committed()]
        return len(records) - len(running), max(steps, default=0)

    def on_restart(restart: Restart) -> None:
        write("restart", **asdict(restart) | {"since_failure_s": round(restart.since_failure_s, 3)})

    folder.write_event("attempt_began", stages=list(stages))
    threading.Thread(target=keep_alive, name="dpkd-alive", daemon=True).start()
    status = "failed"
    try:
        yield Supervision(hangs=folder.hangs, progress=progress, on_restart=on_restart)
        status = "done"
    except (StopRequested, KeyboardInterrupt):
        status = "stopped"
        raise
    finally:
        ended.set()
        write("attempt_ended", status=status)
