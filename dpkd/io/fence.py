"""The fencing token: write-once claims number the attempts, and an attempt stops if a newer one has started.

    <folder>/attempt-0003.json      the third attempt has started; created once, empty; the attempt may write to it

Two attempts at one run may overlap, for example if a cluster restarts a driver that only lost its network. Run files
and checkpoints have a fence each, because checkpoints may be on another storage and outlive the run folder.
"""

import re

from dpkd.errors import UserError
from dpkd.io import storage


class StaleAttempt(UserError):
    """A newer attempt at the same run has started; this one must publish nothing more."""


class Fence:
    """The attempts that write to a folder, a path or a URL."""

    def __init__(self, url: str) -> None:
        self._url = url

    def acquire(self, *, after: int = 0) -> int:
        """Starts an attempt; returns its number, which is higher than `after` and all earlier numbers."""
        attempt = max(after, self.newest()) + 1
        while not storage.create(self.claim(attempt)):
            attempt = max(attempt, self.newest()) + 1
        return attempt

    def claim(self, attempt: int) -> str:
        """The path or URL of an attempt's claim."""
        return storage.join(self._url, f"attempt-{attempt:04d}.json")

    def newest(self) -> int:
        """The number of the newest attempt, 0 before the first."""
        return max(self.attempts(storage.list_names(self._url)), default=0)

    @staticmethod
    def attempts(names: list[str]) -> list[int]:
        """The numbers of the attempts with a claim among the file names `names`."""
        return [int(match[1]) for name in names if (match := re.fullmatch(r"attempt-([0-9]{4,})\.json", name))]

    def check(self, attempt: int) -> None:
        """Raises `StaleAttempt` if a newer attempt has started."""
        newest = self.newest()
        if newest > attempt:
            raise StaleAttempt(
                f"attempt {newest} at this run has begun ({self.claim(newest)}), so attempt {attempt} stops and "
                "has published nothing since; let one of them run, or set another run.dir"
            )
