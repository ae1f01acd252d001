"""What stands in a folder of checkpoints, on a disk or on object storage, and which of it counts.

    <folder>/attempt-0003.json       {"attempt": 3, "stood": [what counted when it began], "checksum": …}
    <folder>/step-00000200-a0003/    made by attempt 3 after step 200:
        manifest.json                `Manifest`, written last: a checkpoint without it does not count
        files-00001-of-00002.json    `RankFiles` of rank 1, written once they are on the disk
        <part>/…                     what each part wrote, file names differing between ranks

Two attempts at one run may overlap, as when a cluster takes a driver for dead. Each claims a number of its own, and
with it writes down what stood: whatever an older attempt finishes after that does not count, so all readers agree on
what was there when the newer one began, without clocks or locks.
"""

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from dpkd.errors import UserError
from dpkd.io import storage
from dpkd.io.errors import NO_FILE
from dpkd.io.record import checked, parse_checked

FORMAT = 2
MANIFEST = "manifest.json"


class Superseded(UserError):
    """A newer attempt at the same run has begun: this one publishes nothing any more."""


@dataclass(frozen=True, order=True)
class Mark:
    """Names one checkpoint: its step, and the attempt that made it."""

    step: int
    attempt: int

    @property
    def name(self) -> str:
        """The folder's name."""
        return f"step-{self.step:08d}-a{self.attempt:04d}"

    @staticmethod
    def of(name: str) -> "Mark | None":
        """The mark of a folder's name, None for any other name."""
        found = re.fullmatch(r"step-([0-9]{8,})-a([0-9]{4,})", name)
        return Mark(int(found[1]), int(found[2])) if found else None


class FileFacts(BaseModel):
    """What a file must be like."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(BaseModel):
    """The content of manifest.json: all files of a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: int
    step: int
    attempt: int
    world_size: int
    files: dict[str, FileFacts]
    """path below the checkpoint's folder -> facts"""

    @field_validator("files")
    @classmethod
    def _stay_below(cls, files: dict[str, FileFacts]) -> dict[str, FileFacts]:
        for path in files:
            parts = PurePosixPath(path).parts
            if not parts or ".." in parts or path.startswith("/") or "\\" in path or "\0" in path:
                raise ValueError(f"{path!r} is no path below a checkpoint's folder")
        return files


class RankFiles(BaseModel):
    """The content of files-<rank>-of-<size>.json: the files of one rank."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    files: dict[str, FileFacts]


class Claim(BaseModel):
    """The content of attempt-<number>.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    attempt: int
    stood: tuple[str, ...]


class CheckpointStore:
    """The checkpoints in a folder, a path or a URL; one process of a run, rank 0, changes what counts."""

    def __init__(self, url: str) -> None:
        self.url = url

    def place(self, mark: Mark, *parts: str) -> str:
        """Where a checkpoint, or a file of it, stands."""
        return storage.join(self.url, mark.name, *parts)

    def claim(self) -> tuple[int, list[Mark]]:
        """Begins an attempt; returns its number and the checkpoints that count, oldest first."""
        while True:
            names = storage.list_names(self.url)
            # a claim may be lost: a number that made a checkpoint is never given again
            made = [mark.attempt for name in names if (mark := Mark.of(name)) is not None]
            attempt = max([*self._claims(names), *made], default=0) + 1
            if not storage.create(self._claim_place(attempt)):
                continue
            # until then an older attempt published, and swept; from here on it does neither
            found = self.standing(before=attempt)
            claim = Claim(attempt=attempt, stood=tuple(mark.name for mark in found))
            storage.write_bytes_atomic(self._claim_place(attempt), checked(claim.model_dump(mode="json")))
            return attempt, found

    def standing(self, *, before: int | None = None) -> list[Mark]:
        """The checkpoints that count, oldest first: whole, and finished before any newer attempt began.

        `before` leaves out the claims of this attempt and newer ones.
        """
        names = storage.list_names(self.url)
        marks = sorted(mark for name in names if (mark := Mark.of(name)) is not None)
        claimed = [attempt for attempt in self._claims(names) if before is None or attempt < before]
        claims = [claim for attempt in claimed if (claim := self._claim(attempt)) is not None]
        return [
            mark
            for mark in marks
            if all(mark.name in claim.stood for claim in claims if claim.attempt > mark.attempt)
            and storage.exists(self.place(mark, MANIFEST))
        ]

    def manifest(self, mark: Mark) -> Manifest:
        """The manifest of a checkpoint; raises ValueError where it is none, or of another checkpoint or format."""
        try:
            manifest = Manifest.model_validate_json(storage.read_bytes(self.place(mark, MANIFEST)))
        except NO_FILE as error:
            raise ValueError(f"{MANIFEST} is missing") from error
        except ValidationError as error:
            raise ValueError(f"{MANIFEST} cannot be read ({error.errors()[0]['msg']})") from error
        if manifest.format != FORMAT:
            raise ValueError(f"{MANIFEST} has format {manifest.format}, this version reads {FORMAT}")
        if (manifest.step, manifest.attempt) != (mark.step, mark.attempt):
            raise ValueError(f"{MANIFEST} is that of step {manifest.step}, attempt {manifest.attempt}")
        return manifest

    def publish(self, mark: Mark, *, world_size: int, files: dict[str, FileFacts]) -> None:
        """Makes a checkpoint count, whose files all stand; raises `Superseded` where a newer attempt has begun."""
        self.refuse_superseded(mark.attempt)
        manifest = Manifest(format=FORMAT, step=mark.step, attempt=mark.attempt, world_size=world_size, files=files)
        storage.write_bytes_atomic(self.place(mark, MANIFEST), manifest.model_dump_json(indent=1).encode())
        self.refuse_superseded(mark.attempt)  # one that began meanwhile may not count it

    def refuse_superseded(self, attempt: int) -> None:
        """Raises `Superseded` where a newer attempt than this one has begun."""
        newest = max(self._claims(), default=0)
        if newest > attempt:
            raise Superseded(
                f"attempt {newest} at this run has begun ({self._claim_place(newest)}), so attempt {attempt} stops "
                "here and has published nothing since; let one of them run, or choose another run.dir"
            )

    def sweep(self, *, attempt: int, base: Mark | None, keep: int) -> None:
        """Removes what this attempt and older ones left, but for the newest `keep` checkpoints on its line.

        The line of an attempt is what it made itself and what led to `base`, the checkpoint that it loaded: a later
        one of an older attempt, passed over because it was damaged, must not push out a good one. Half-written files
        go too, but for this attempt's own next checkpoint, which other ranks may have begun. While none is on its line,
        whole ones stay. Raises `Superseded`, and removes nothing, where a newer attempt has begun.
        """
        self.refuse_superseded(attempt)
        line = [mark for mark in self.standing() if mark.attempt == attempt or (base is not None and mark <= base)]
        kept = line[-keep:]
        newest = max(kept, default=Mark(0, 0))
        for name in storage.list_names(self.url):
            mark = Mark.of(name)
            claiming = re.fullmatch(re.escape(storage.TEMPORARY_PREFIX) + r".*attempt-([0-9]{4,})\.json", name)
            if mark in kept:
                self._tidy(mark)
            elif mark is not None and (mark.attempt < attempt or (mark.attempt == attempt and mark < newest)):
                if kept or not storage.exists(self.place(mark, MANIFEST)):
                    self.abandon(mark)
            elif claiming and int(claiming[1]) <= attempt:  # others may be about to claim the next number
                storage.remove(storage.join(self.url, name))

    def abandon(self, mark: Mark) -> None:
        """Removes a checkpoint, or what there is of it."""
        storage.remove(self.place(mark, MANIFEST))  # first: what is half removed must not count
        storage.remove_tree(self.place(mark))

    def _tidy(self, mark: Mark) -> None:
        """Removes the hidden files and folders that writes with an error left in a checkpoint that counts."""
        for name in storage.list_names(self.place(mark)):
            if name.startswith("."):
                storage.remove_tree(self.place(mark, name))

    def _claims(self, names: list[str] | None = None) -> list[int]:
        names = storage.list_names(self.url) if names is None else names
        return sorted(int(found[1]) for name in names if (found := re.fullmatch(r"attempt-([0-9]{4,})\.json", name)))

    def _claim_place(self, attempt: int) -> str:
        return storage.join(self.url, f"attempt-{attempt:04d}.json")

    def _claim(self, attempt: int) -> Claim | None:
        try:
            return Claim.model_validate(parse_checked(storage.read_bytes(self._claim_place(attempt))))
        except (*NO_FILE, ValueError):  # damaged: better a late checkpoint counts than that none does
            return None
