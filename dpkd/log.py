"""The log of a run: one line per event, progress as one line in place or as plain lines, and `events.jsonl`.

Lines go to standard output, also from rank 0. `events.jsonl` holds one JSON object per line:
`{"time": seconds since 1970, "kind": name, "attempt": number, …}`.
"""

import errno
import io
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from dpkd.errors import UserError, printable
from dpkd.io.errors import read_errors, write_errors

INTERVAL_S, IN_PLACE_S = 10.0, 0.2
"""Seconds between plain lines, and between those that replace one another in a terminal."""
CLEAR = "\r\x1b[K"
"""Removes the last line of a terminal, if no newline has ended it."""

_in_place = 0
"""Number of open `Progress`es whose line stands in a terminal."""


@contextmanager
def safe_output() -> Iterator[None]:
    """Makes printing safe: replaces characters that the stream lacks, and drops output if its reader is gone."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EPIPE, errno.EIO, errno.EBADF):
            with Path(os.devnull).open("wb") as nowhere:
                os.dup2(nowhere.fileno(), 1)


class _Terminal(logging.Handler):
    """Prints each line to standard output, in place of a line of progress; `printable` escapes and masks the line."""

    def emit(self, record: logging.LogRecord) -> None:
        with safe_output():
            print((CLEAR if _in_place else "") + printable(record.getMessage()), flush=True)


logger = logging.getLogger("dpkd")
"""The log that users read during a run: one line per event."""
logger.setLevel(logging.INFO)
logger.propagate = False
logger.addHandler(_Terminal())


def duration(seconds: float) -> str:
    """A duration as text: `8 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Progress:
    """Shows the progress of a long task: a line in place in a terminal, else one every ten seconds, and one at its end.

    `start` is the work done by an earlier run; it counts as done, but not for the rate. `shown=False` prints nothing
    (on ranks other than 0).
    """

    def __init__(
        self,
        title: str,
        total: int,
        *,
        unit: str = "images",
        start: int = 0,
        shown: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._title, self._total, self._unit = printable(title), total, unit
        self._start = self._done = start
        self._shown, self._clock = shown, clock
        self._note = ""

    def __enter__(self) -> Self:
        global _in_place  # noqa: PLW0603 (one terminal per process)
        self._began_s = self._line_s = self._clock()
        self._is_in_place = self._shown and sys.stdout.isatty()
        _in_place += self._is_in_place
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        global _in_place  # noqa: PLW0603
        if self._is_in_place:
            _in_place -= 1
            with safe_output():
                print(CLEAR, end="", flush=True)
        if self._shown and kind is None:
            count, elapsed = self._done - self._start, duration(self._clock() - self._began_s)
            logger.info(f"{self._title}: {count:,} {self._unit} in {elapsed}, {self._rate}{self._note}")

    def advance(self, count: int = 1) -> None:
        """Adds `count` to the work done."""
        self.reach(self._done + count)

    def reach(self, done: int, total: int | None = None, *, note: str | None = None) -> None:
        """Sets the work done, the total if it has become known, and a note at the end of the line."""
        self._done, self._total = done, self._total if total is None else total
        self._note = self._note if note is None else f", {note}"
        if not self._shown or self._clock() - self._line_s < (IN_PLACE_S if self._is_in_place else INTERVAL_S):
            return
        self._line_s = self._clock()
        share = f" ({done / self._total:.0%})" if self._total else ""
        left = f", {duration((self._total - done) / self._per_s)} left" if done > self._start else ""
        line = f"{self._title}: {done:,} of {self._total:,} {self._unit}{share}, {self._rate}{left}{self._note}"
        if self._is_in_place:
            with safe_output():
                print(CLEAR + line[: shutil.get_terminal_size().columns - 1], end="", flush=True)
        else:
            logger.info(line)

    @property
    def _per_s(self) -> float:
        return (self._done - self._start) / max(self._clock() - self._began_s, 1e-9)

    @property
    def _rate(self) -> str:
        return f"{self._per_s:,.{0 if self._per_s >= 10 else 1}f} {self._unit}/s"


def append_json(path: Path, record: Mapping[str, Any]) -> None:
    """Appends a record as one JSON line in one write, so several processes may share the file."""
    line = json.dumps(record) + "\n"
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b", buffering=0) as file:
            torn = file.tell() > 0 and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n"  # a kill cut the last line
            file.write(b"\n" * torn + line.encode())


class EventReader:
    """Reads the new lines of a growing JSON-lines file; skips and counts lines that a kill has cut."""

    def __init__(self, path: Path | str) -> None:
        self._path = Path(path)
        self._offset = self.num_torn = 0

    def new(self) -> list[dict[str, Any]]:
        """The events since the last call, in the order written."""
        try:
            with read_errors(self._path), self._path.open("rb") as file:
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return []
        except (IsADirectoryError, NotADirectoryError) as error:
            raise UserError(f"{self._path} is not a file: move it away, then run the command again") from error
        self._offset += len(whole) + len(newline)
        events = []
        for line in whole.split(b"\n"):
            try:
                events.append(json.loads(line))
            except ValueError:
                self.num_torn += bool(line)
        return events
