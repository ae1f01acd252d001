"""What a person sees of a run: one line an event, a bar or plain lines for anything long, and `events.jsonl`.

Lines and bars go to standard output, also from the first training process. `events.jsonl` holds one JSON object a line:
`{"time": seconds since 1970, "kind": name, ...numbers}`.
"""

import errno
import json
import logging
import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichBar

from dpkd.errors import UserError, printable
from dpkd.io.errors import NO_FILE, read_errors, write_errors
from dpkd.io.untrusted import parse_json

INTERVAL_S = 10.0
"""Seconds between plain lines."""

GONE = (errno.EPIPE, errno.EIO, errno.EBADF)
"""What writing fails with where the terminal was closed, or the command at the other end of the pipe has ended."""

_bars: list[RichBar] = []


class _Terminal(logging.Handler):
    """Prints each line to standard output, above the bar where one is shown; `printable` says what is escaped."""

    def emit(self, record: logging.LogRecord) -> None:
        line = printable(record.getMessage())
        with heard_or_not():
            if _bars:
                _bars[-1].console.print(line, markup=False, highlight=False, soft_wrap=True)
            else:
                print(line, flush=True)


logger = logging.getLogger("dpkd")
"""What users read while dpkd works: one line an event."""
logger.setLevel(logging.INFO)
logger.propagate = False
logger.addHandler(_Terminal())


@contextmanager
def heard_or_not() -> Iterator[None]:
    """Lets work go on where its output cannot be written; where nobody is left to read it, the rest goes nowhere."""
    try:
        yield
    except OSError as error:
        if error.errno in GONE:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for number in (1, 2):
                if _hung_up(number):
                    os.dup2(nowhere, number)
            os.close(nowhere)


def _hung_up(number: int) -> bool:
    look = select.poll()
    look.register(number, 0)
    return bool(look.poll(0))


def duration(seconds: float) -> str:
    """A duration in words: `8 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Progress:
    """How far a long piece of work is: a bar in a terminal, else a line every ten seconds, and a line at its end.

    `start` is what an earlier run had done already; it counts as done, not for the rate. `shown=False` prints nothing
    (the other ranks). `note` adds a few words, such as the loss, to what is shown.
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
        self._began_s = self._line_s = clock()

    def __enter__(self) -> Self:
        self._began_s = self._line_s = self._clock()
        if self._shown and sys.stdout.isatty():
            self._bar = _terminal_bar(self._unit)
            self._task = self._bar.add_task(
                escape(self._title), total=self._total, completed=self._done, note="", rate=""
            )
            with heard_or_not():
                self._bar.start()
            _bars.append(self._bar)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            _bars.remove(self._bar)
            with heard_or_not():
                self._bar.stop()
        if self._shown and kind is None:
            logger.info(self._last_line())

    def advance(self, count: int = 1) -> None:
        """Counts `count` more as done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, rate=self._rate_text(), note=escape(self._note))
        elif self._shown and self._clock() - self._line_s >= INTERVAL_S:
            self._line_s = self._clock()
            logger.info(self._line())

    def reach(self, done: int, total: int) -> None:
        """Takes how much is done and how much there is, for work that finds out its own size."""
        self._total = total
        if self._bar is not None:
            self._bar.update(self._task, total=total)
        self.advance(done - self._done)

    def note(self, text: str) -> None:
        """Shows a few words, such as the loss, with the next advance."""
        self._note = text

    def _rate(self) -> float:
        return (self._done - self._start) / max(self._clock() - self._began_s, 1e-9)

    def _rate_text(self) -> str:
        rate = self._rate()
        return f"{rate:,.0f} {self._unit}/s" if rate >= 10 else f"{rate:.1f} {self._unit}/s"

    def _line(self) -> str:
        share = f" ({self._done / self._total:.0%})" if self._total else ""
        left = ""
        if self._done > self._start:
            left = f", {duration((self._total - self._done) / self._rate())} left"
        note = f", {self._note}" if self._note else ""
        return f"{self._title}: {self._done:,} of {self._total:,} {self._unit}{share}, {self._rate_text()}{left}{note}"

    def _last_line(self) -> str:
        elapsed = self._clock() - self._began_s
        note = f", {self._note}" if self._note else ""
        count = self._done - self._start
        return f"{self._title}: {count:,} {self._unit} in {duration(elapsed)}, {self._rate_text()}{note}"


def _terminal_bar(unit: str) -> RichBar:
    return RichBar(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=_bars[-1].console if _bars else Console(file=sys.stdout),  # bars inside one another share a console
        transient=True,
    )


class EventLog:
    """Appends the events of a run to a JSON-lines file, each with the attempt that wrote it."""

    def __init__(self, path: Path | str, *, attempt: str | None = None) -> None:
        self._path = Path(path)
        self._always = {} if attempt is None else {"attempt": attempt}

    def write(self, kind: str, **numbers: Any) -> None:
        """Appends one event; a line is written whole, so several processes may share the file."""
        event = {"time": round(time.time(), 3), "kind": kind, **self._always, **numbers}
        line = json.dumps(event) + "\n"
        with write_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                size = os.fstat(handle).st_size
                torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"  # a kill cut the last line short
                os.write(handle, b"\n" * torn + line.encode())
            finally:
                os.close(handle)


class EventReader:
    """Reads the events of a run as they come; a line that a kill has torn is left out and counted."""

    def __init__(self, path: Path | str) -> None:
        self._path = Path(path)
        self._offset = 0
        self.num_torn = 0

    def new(self) -> list[dict[str, Any]]:
        """The events since the last call, in the order written; raises `UserError` where no file stands there."""
        try:
            with read_errors(self._path), self._path.open("rb") as file:
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return []
        except NO_FILE as error:
            raise UserError(f"{self._path} is no file: restore it from a copy, or move it away") from error
        self._offset += len(whole) + len(newline)
        events = [_event(line) for line in whole.split(b"\n") if line.strip()]
        self.num_torn += events.count(None)
        return [event for event in events if event is not None]


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        event = parse_json(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None
