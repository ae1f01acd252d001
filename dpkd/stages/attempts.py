"""What the driver of a run knows of its attempts: how far they got, who hung, every restart as an event."""

from itertools import count

from dpkd.gang import Restart, Supervision
from dpkd.report.progress import EventLog
from dpkd.stages.record import RunFolder
from dpkd.train.checkpoint_store import CheckpointStore


def supervision(folder: RunFolder) -> Supervision:
    """Reports of hangs go to `<run>/hangs`, restarts to `events.jsonl`; a later checkpoint is progress."""
    events, generations = EventLog(folder.events), count()

    def on_restart(restart: Restart) -> None:
        events.write(
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
