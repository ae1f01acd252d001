"""The fencing token: attempts are numbered by write-once claims, and an attempt stops once a newer one has begun.

    <folder>/attempt-0003.json      the third attempt has begun; made once, empty, and then its attempt's to fill

Two attempts at one run may overlap, as when a cluster takes a driver for dead that was only cut off. Run files and
checkpoints have a fence each, because checkpoints may be on another storage and outlive the run folder.
"""

import re

from dpkd.errors import UserError
from dpkd.io import storage


class StaleAttempt(UserError):
    """A newer attempt at the same run has begun: this one publishes nothing any more."""


class Fence:
    """The attempts that write to a folder, a path or a URL."""

    def __init__(self, url: str) -> None:
        self._url = url

    def acquire(self, *, after: int = 0) -> int:
        """Begins an attempt; its number is higher than `after` and all that began before."""
        attempt = max(after, self.newest()) + 1
        while not storage.create(self.claim(attempt)):
            attempt = max(attempt, self.newest()) + 1
        return attempt

    def claim(self, attempt: int) -> str:
        """The place of an attempt's claim."""
        return storage.join(self._url, f"attempt-{attempt:04d}.json")

    def newest(self) -> int:
        """The number of the newest attempt, 0 before the first."""
        return max(self.attempts(storage.list_names(self._url)), default=0)

    @staticmethod
    def attempts(names: list[str]) -> list[int]:
        """The numbers of the attempts whose claims are among the names of the folder."""
        return [int(match[1]) for name in names if (match := re.fullmatch(r"attempt-([0-9]{4,})\.json", name))]

    def check(self, attempt: int) -> None:
        """Raises `StaleAttempt` where a newer attempt has begun."""
        newest = self.newest()
        if newest > attempt:
            raise StaleAttempt(
                f"attempt {newest} at this run has begun ({self.claim(newest)}), so attempt {attempt} stops here and "
                "has published nothing since; let one of them run, or choose another run.dir"
            )
