"""The checkpoints in a folder, on a disk or on object storage, and which of them are committed.

    <folder>/attempt-0003.json       claim of attempt 3: {"committed": [names of checkpoints], "checksum": …}
    <folder>/step-00000200-a0003/    made by attempt 3 after step 200:
        manifest.json                `Manifest`, written last: a checkpoint without it is not committed
        files-00001-of-00002.json    the files of rank 1, written once they are on the disk
        <part>/…                     what each part wrote, file names differing between ranks

Each attempt writes down what was committed when it began. What an older one finishes after that does not count, so all
readers agree on what counts, without clocks or locks.
"""

import re
from contextlib import suppress
from dataclasses import asdict, dataclass

from dpkd.io import storage
from dpkd.io.errors import NO_FILE
from dpkd.io.fence import Fence
from dpkd.io.record import checked, parse_checked

FORMAT = 3
MANIFEST = "manifest.json"


@dataclass(frozen=True, order=True)
class CheckpointId:
    """A checkpoint: its step, and the attempt that made it."""

    step: int
    attempt: int

    @property
    def name(self) -> str:
        """The folder's name."""
        return f"step-{self.step:08d}-a{self.attempt:04d}"

    @staticmethod
    def of(name: str) -> "CheckpointId | None":
        """The checkpoint of a folder's name, None for any other name."""
        match = re.fullmatch(r"step-([0-9]{8,})-a([0-9]{4,})", name)
        return CheckpointId(int(match[1]), int(match[2])) if match else None


@dataclass(frozen=True)
class FileFacts:
    """What a file must be like."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """All files of a checkpoint, by their path below its folder."""

    id: CheckpointId
    world_size: int
    files: dict[str, FileFacts]


def write_files(place: str, files: dict[str, FileFacts]) -> None:
    """Writes the list of one rank's files."""
    content = {"files": {path: asdict(facts) for path, facts in files.items()}}
    storage.write_bytes_atomic(place, checked(content))


def read_files(place: str) -> dict[str, FileFacts]:
    """The list that `write_files` wrote."""
    return {path: FileFacts(**facts) for path, facts in parse_checked(storage.read_bytes(place))["files"].items()}


class CheckpointStore:
    """The checkpoints in a folder, a path or a URL; one process of a run, rank 0, changes what is committed."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.fence = Fence(url)

    def place(self, checkpoint: CheckpointId, *parts: str) -> str:
        """The location of a checkpoint, or of a file in it."""
        return storage.join(self.url, checkpoint.name, *parts)

    def acquire(self) -> tuple[int, list[CheckpointId]]:
        """Begins an attempt; returns its number and the committed checkpoints, oldest first."""
        # a claim may be lost: a number that made a checkpoint is never given again
        attempt = self.fence.acquire(after=max((checkpoint.attempt for checkpoint in self._all()), default=0))
        committed = self.committed(before=attempt)  # from here on older attempts publish and sweep nothing
        content = {"committed": [checkpoint.name for checkpoint in committed]}
        storage.write_bytes_atomic(self.fence.claim(attempt), checked(content))
        return attempt, committed

    def committed(self, *, before: int | None = None) -> list[CheckpointId]:
        """The checkpoints that count, oldest first: whole, and finished before any newer attempt began.

        `before` leaves out the claims of this attempt and newer ones.
        """
        names = storage.list_names(self.url)
        claims: dict[int, list[str]] = {}
        for attempt in Fence.attempts(names):
            if before is None or attempt < before:
                # an attempt that has not written its claim yet, or whose claim is damaged, excludes nothing:
                # better a late checkpoint counts than that none does
                with suppress(*NO_FILE, ValueError):
                    claims[attempt] = parse_checked(storage.read_bytes(self.fence.claim(attempt)))["committed"]
        return [
            checkpoint
            for checkpoint in self._all(names)
            if all(checkpoint.name in claim for attempt, claim in claims.items() if attempt > checkpoint.attempt)
            and storage.exists(self.place(checkpoint, MANIFEST))
        ]

    def manifest(self, checkpoint: CheckpointId) -> Manifest:
        """The manifest of a checkpoint; raises ValueError where it is damaged, or of another checkpoint or format."""
        try:
            content = parse_checked(storage.read_bytes(self.place(checkpoint, MANIFEST)))
        except NO_FILE as error:
            raise ValueError(f"{MANIFEST} is missing") from error
        except ValueError as error:
            raise ValueError(f"{MANIFEST} cannot be read ({error})") from error
        if content.get("format") != FORMAT:
            raise ValueError(f"{MANIFEST} has format {content.get('format')}, this version reads {FORMAT}")
        if (content["step"], content["attempt"]) != (checkpoint.step, checkpoint.attempt):
            raise ValueError(f"{MANIFEST} is that of step {content['step']}, attempt {content['attempt']}")
        files = {path: FileFacts(**facts) for path, facts in content["files"].items()}
        return Manifest(checkpoint, content["world_size"], files)

    def publish(self, manifest: Manifest) -> None:
        """Commits a checkpoint whose files are all in place; raises `StaleAttempt` where a newer attempt has begun."""
        self.fence.check(manifest.id.attempt)
        content = {"format": FORMAT, **asdict(manifest.id), "world_size": manifest.world_size}
        content["files"] = {path: asdict(facts) for path, facts in manifest.files.items()}
        storage.write_bytes_atomic(self.place(manifest.id, MANIFEST), checked(content))
        self.fence.check(manifest.id.attempt)  # one that began meanwhile may not count it

    def sweep(self, *, attempt: int, base: CheckpointId | None, keep: int) -> None:
        """Removes what this attempt and older ones left, except the newest `keep` checkpoints on its line.

        The line of an attempt is what it made itself and what led to `base`, the checkpoint that it loaded: a later
        one of an older attempt, passed over because it was damaged, must not push out a good one. Half-written files
        go too, except this attempt's own next checkpoint, which other ranks may have begun. While none is on its line,
        whole ones stay. Raises `StaleAttempt`, and removes nothing, where a newer attempt has begun.
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
            if claim and int(claim[1]) <= attempt:  # newer attempts may be about to write theirs
                storage.remove(storage.join(self.url, name))
            elif checkpoint in kept:
                for hidden in storage.list_names(self.place(checkpoint)):
                    if hidden.startswith("."):  # what writes with an error left
                        storage.remove_tree(self.place(checkpoint, hidden))
            elif (
                checkpoint is not None
                and (checkpoint.attempt, checkpoint) < (attempt, newest)
                and (kept or not storage.exists(self.place(checkpoint, MANIFEST)))
            ):
                self.remove(checkpoint)

    def remove(self, checkpoint: CheckpointId) -> None:
        """Removes a checkpoint, or what there is of it."""
        storage.remove(self.place(checkpoint, MANIFEST))  # first: what is half removed must not count
        storage.remove_tree(self.place(checkpoint))

    def _all(self, names: list[str] | None = None) -> list[CheckpointId]:
        """The checkpoints that there are, committed or not, oldest first."""
        names = storage.list_names(self.url) if names is None else names
        return sorted(checkpoint for name in names if (checkpoint := CheckpointId.of(name)) is not None)
