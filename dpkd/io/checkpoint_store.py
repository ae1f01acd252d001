"""The checkpoints in a folder, on a disk or on object storage, and which of them are committed.

    <folder>/attempt-0003.json       claim of attempt 3: {"committed": [names of checkpoints], "checksum": …}
    <folder>/step-00000200-a0003/    checkpoint of attempt 3 after step 200:
        manifest.json                `Manifest`, written last: a checkpoint without it is not committed
        files-00001-of-00002.json    list of the files of rank 1, written after they are on the disk
        <part>/…                     files of each part; their names differ between ranks

Each attempt first records the committed checkpoints. A checkpoint that an older attempt finishes later does not count,
so all readers agree without clocks or locks.
"""

import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from dpkd.io import storage
from dpkd.io.errors import NO_FILE
from dpkd.io.fence import Fence
from dpkd.io.record import checked, parse_checked

FORMAT = 3
MANIFEST = "manifest.json"


@dataclass(frozen=True, order=True)
class CheckpointId:
    """A checkpoint: its step, and the attempt that wrote it."""

    step: int
    attempt: int

    @property
    def name(self) -> str:
        """The folder's name."""
        return f"step-{self.step:08d}-a{self.attempt:04d}"

    @staticmethod
    def of(name: str) -> "CheckpointId | None":
        """The checkpoint with this folder name; None for any other name."""
        match = re.fullmatch(r"step-([0-9]{8,})-a([0-9]{4,})", name)
        return CheckpointId(int(match[1]), int(match[2])) if match else None


@dataclass(frozen=True)
class FileFacts:
    """The expected size and checksum of a file."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """All files of a checkpoint, by their path below its folder."""

    id: CheckpointId
    world_size: int
    files: dict[str, FileFacts]


def write_files(place: str, files: dict[str, FileFacts], **facts: int) -> None:
    """Writes a list of files, of one rank or, with further facts, of a whole checkpoint."""
    content = {**facts, "files": {path: asdict(each) for path, each in files.items()}}
    storage.write_bytes_atomic(place, checked(content))


def read_files(place: str) -> tuple[dict[str, FileFacts], dict[str, Any]]:
    """The files and the further facts of a list of `write_files`."""
    content = parse_checked(storage.read_bytes(place))
    return {path: FileFacts(**facts) for path, facts in content.pop("files", {}).items()}, content


class CheckpointStore:
    """The checkpoints in a folder, a path or a URL; only rank 0 of a run commits and removes them."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.fence = Fence(url)

    def place(self, checkpoint: CheckpointId, *parts: str) -> str:
        """The location of a checkpoint, or of a file in it."""
        return storage.join(self.url, checkpoint.name, *parts)

    def acquire(self) -> tuple[int, list[CheckpointId]]:
        """Starts an attempt; returns its number and the committed checkpoints, oldest first."""
        # a claim may be lost: the number of an attempt with checkpoints is never used again
        attempt = self.fence.acquire(after=max((checkpoint.attempt for checkpoint in self._all()), default=0))
        committed = self.committed(before=attempt)  # older attempts publish and remove nothing from now on
        content = {"committed": [checkpoint.name for checkpoint in committed]}
        storage.write_bytes_atomic(self.fence.claim(attempt), checked(content))
        return attempt, committed

    def committed(self, *, before: int | None = None) -> list[CheckpointId]:
        """The checkpoints that count, oldest first: whole, and finished before any newer attempt started.

        Ignores the claims of the attempt `before` and of newer ones.
        """
        names = storage.list_names(self.url)
        claims: dict[int, list[str]] = {}
        for attempt in Fence.attempts(names):
            if before is None or attempt < before:
                # an attempt without a claim yet, or with a damaged one, excludes nothing:
                # it is better to count a late checkpoint than none
                with suppress(*NO_FILE, ValueError):
                    claims[attempt] = parse_checked(storage.read_bytes(self.fence.claim(attempt)))["committed"]
        return [
            checkpoint
            for checkpoint in self._all(names)
            if all(checkpoint.name in claim for attempt, claim in claims.items() if attempt > checkpoint.attempt)
            and storage.exists(self.place(checkpoint, MANIFEST))
        ]

    def manifest(self, checkpoint: CheckpointId) -> Manifest:
        """The manifest; raises `ValueError` if it is damaged, or belongs to another checkpoint or format."""
        try:
            files, facts = read_files(self.place(checkpoint, MANIFEST))
        except NO_FILE as error:
            raise ValueError(f"{MANIFEST} is missing") from error
        except ValueError as error:
            raise ValueError(f"{MANIFEST} cannot be read ({error})") from error
        if facts.get("format") != FORMAT:
            raise ValueError(f"{MANIFEST} has format {facts.get('format')}, this version reads {FORMAT}")
        if (facts["step"], facts["attempt"]) != (checkpoint.step, checkpoint.attempt):
            raise ValueError(f"{MANIFEST} belongs to step {facts['step']}, attempt {facts['attempt']}")
        return Manifest(checkpoint, facts["world_size"], files)

    def publish(self, manifest: Manifest) -> None:
        """Commits a checkpoint whose files are all in place; raises `StaleAttempt` if a newer attempt has started."""
        self.fence.check(manifest.id.attempt)
        facts = {"format": FORMAT, **asdict(manifest.id), "world_size": manifest.world_size}
        write_files(self.place(manifest.id, MANIFEST), manifest.files, **facts)
        self.fence.check(manifest.id.attempt)  # an attempt that started meanwhile may not count it

    def sweep(self, *, attempt: int, base: CheckpointId | None, keep: int) -> None:
        """Removes the files of this attempt and older ones, except the newest `keep` checkpoints on its line.

        The line of an attempt is its checkpoints and all up to `base`, the checkpoint that it loaded: a damaged later
        checkpoint of an older attempt must not replace a good one. Half-written files are removed, except the next
        checkpoint of this attempt, which other ranks may have started. If no checkpoint is on the line, whole ones are
        kept. Raises `StaleAttempt`, and removes nothing, if a newer attempt has started.
        """
        self.fence.check(attempt)
        line = [
            checkpoint
            for checkpoint in self.committed()
            if checkpoint.attempt == attempt or (base is not None and checkpoint <= base)
        ]
        kept = line[-keep:]
        newest = max(kept, default=CheckpointId(0, 0))
        for name in storage.list_names(self.url):
            checkpoint = CheckpointId.of(name)
            claim = re.fullmatch(re.escape(storage.TEMPORARY_PREFIX) + r".*attempt-([0-9]{4,})\.json", name)
            if claim and int(claim[1]) <= attempt:  # a newer attempt may be writing its claim
                storage.remove(storage.join(self.url, name))
            elif checkpoint in kept:
                for hidden in storage.list_names(self.place(checkpoint)):
                    if hidden.startswith("."):  # left by failed writes
                        storage.remove_tree(self.place(checkpoint, hidden))
            elif (
                checkpoint is not None
                and (checkpoint.attempt, checkpoint) < (attempt, newest)
                and (kept or not storage.exists(self.place(checkpoint, MANIFEST)))
            ):
                self.remove(checkpoint)

    def remove(self, checkpoint: CheckpointId) -> None:
        """Removes a whole or partial checkpoint."""
        storage.remove(self.place(checkpoint, MANIFEST))  # first: a half-removed checkpoint must not count
        storage.remove_tree(self.place(checkpoint))

    def _all(self, names: list[str] | None = None) -> list[CheckpointId]:
        """All checkpoints, committed or not, oldest first."""
        names = storage.list_names(self.url) if names is None else names
        return sorted(checkpoint for name in names if (checkpoint := CheckpointId.of(name)) is not None)
