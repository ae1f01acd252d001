"""The log of a run: one line per event, progress as a bar or as plain lines, and `events.jsonl`.

Lines and bars go to standard output, also from rank 0. `events.jsonl` holds one JSON object per line:
`{"time": seconds since 1970, "kind": name, "attempt": number, …}`.
"""

import errno
import io
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from dpkd.errors import UserError, printable
from dpkd.io.errors import read_errors, write_errors

if TYPE_CHECKING:  # rich is loaded by the first table or bar
    from rich.console import RenderableType
    from rich.progress import Progress as RichBar

INTERVAL_S = 10.0
"""Seconds between plain lines."""

_bars: list["RichBar"] = []


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
    """Prints each line to standard output, above a visible bar; `printable` escapes and masks the line."""

    def emit(self, record: logging.LogRecord) -> None:
        line = printable(record.getMessage())
        with safe_output():
            if _bars:
                _bars[-1].console.print(line, markup=False, highlight=False, soft_wrap=True)
            else:
                print(line, flush=True)


logger = logging.getLogger("dpkd")
"""The log that users read during a run: one line per event."""
logger.setLevel(logging.INFO)
logger.propagate = False
logger.addHandler(_Terminal())


def show(table: "RenderableType") -> None:
    """Prints a Rich table."""
    from rich.console import Console  # noqa: PLC0415

    with safe_output():
        Console().print(table)


def duration(seconds: float) -> str:
    """A duration as text: `8 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Progress:
    """Shows the progress of a long task: a bar in a terminal, else a line every ten seconds, and a line at its end.

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
        self._bar: RichBar | None = None

    def __enter__(self) -> Self:
        self._began_s = self._line_s = self._clock()
        if self._shown and sys.stdout.isatty():
            from rich import console, progress  # noqa: PLC0415

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}", markup=False),
                progress.BarColumn(bar_width=30),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[rate]}", markup=False),
                progress.TimeRemainingColumn(),
                console=_bars[-1].console if _bars else console.Console(file=sys.stdout),  # nested bars share one
                transient=True,
            )
            self._task = self._bar.add_task(self._title, total=self._total, completed=self._done, rate=self._unit)
            with safe_output():
                self._bar.start()
            _bars.append(self._bar)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            _bars.remove(self._bar)
            with safe_output():
                self._bar.stop()
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
        if self._bar is not None:
            self._bar.update(self._task, total=self._total, completed=done, rate=self._rate + self._note)
        elif self._shown and self._clock() - self._line_s >= INTERVAL_S:
            self._line_s = self._clock()
            share = f" ({done / self._total:.0%})" if self._total else ""
            left = f", {duration((self._total - done) / self._per_s)} left" if done > self._start else ""
            count = f"{done:,} of {self._total:,} {self._unit}{share}"
            logger.info(f"{self._title}: {count}, {self._rate}{left}{self._note}")

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
