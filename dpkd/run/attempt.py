"""What the driver of a run knows of its attempts: how far they got, who hung, every restart, where the time went."""

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count

from dpkd.errors import StopRequested
from dpkd.io import storage
from dpkd.io.checkpoint_store import CheckpointStore
from dpkd.launch.worker_group import Restart, Supervision
from dpkd.log import EventReader, logger
from dpkd.report.goodput import Books
from dpkd.run.folder import RunFolder

ALIVE_S = 30.0
"""Seconds between two signs of life of a driver: what a kill of all leaves unaccounted, at most."""


class Attempt:
    """One submission of a run, told in `events.jsonl` with a number of its own; `goodput.json` is kept up to date."""

    def __init__(self, folder: RunFolder) -> None:
        self.events = folder.event_log()
        self._place = folder.goodput
        self._reader, self._books = EventReader(folder.events), Books()
        self._over = threading.Event()
        self._writing = threading.Lock()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A stage of the driver's own."""
        self.events.write("stage_began", stage=name)
        yield
        self.events.write("stage_ended", stage=name)

    def write_account(self) -> None:
        """Writes where the time of the run went until now."""
        with self._writing:
            for event in self._reader.new():
                self._books.add(event)
            table = self._books.account().table() | {"torn_events": self._reader.num_torn}
            storage.write_bytes_atomic(self._place, (json.dumps(table, indent=1) + "\n").encode())

    def keep_alive(self) -> None:
        """Says now and then that the driver lives, until `end`."""
        while not self._over.wait(ALIVE_S):
            with self.best_effort():
                self.events.write("alive")
                self.write_account()

    def end(self, status: str) -> None:
        """The last word."""
        self._over.set()
        with self.best_effort():
            self.events.write("attempt_ended", status=status)
            self.write_account()

    @contextmanager
    def best_effort(self) -> Iterator[None]:
        """An account that cannot be written neither ends a run nor hides the error that did."""
        try:
            yield
        except OSError as error:
            logger.info(f"where the time went could not be written: {error}")


@contextmanager
def attempt_at(folder: RunFolder, stages: Sequence[str]) -> Iterator[Attempt]:
    """An attempt at these stages, until the block ends; the account of the run is written then."""
    attempt = Attempt(folder)
    attempt.events.write("attempt_began", stages=list(stages))
    pulse = threading.Thread(target=attempt.keep_alive, name="dpkd-alive", daemon=True)
    pulse.start()
    status = "failed"
    try:
        yield attempt
        status = "done"
    except (StopRequested, KeyboardInterrupt):
        status = "stopped"
        raise
    finally:
        attempt.end(status)


def supervision(folder: RunFolder, attempt: Attempt) -> Supervision:
    """Reports of hangs go to `<run>/hangs`, restarts to `events.jsonl`; a later checkpoint is progress."""
    generations = count()

    def on_restart(restart: Restart) -> None:
        with attempt.best_effort():
            attempt.events.write(
                "restart",
                generation=next(generations),
                rank=restart.rank,
                cause=restart.cause,
                since_failure_s=round(restart.since_failure_s, 3),
            )

    return Supervision(hangs=folder.hangs, progress=lambda: progress(folder), on_restart=on_restart)


def progress(folder: RunFolder) -> tuple[int, ...]:
    """How many stages are done, and the step of the newest checkpoint of the one that is not."""
    stages = folder.stages()
    done = sum(record["status"] == "done" for record in stages.values())
    running = [name for name, record in stages.items() if record["status"] != "done"]
    steps = [mark.step for name in running for mark in CheckpointStore(folder.checkpoints(name)).standing()]
    return done, max(steps, default=0)
