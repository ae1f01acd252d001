"""What could not be used, by name and reason: a JSON line each, and the limit past which a run stops.

quarantine.jsonl:  {"stage": "pack", "item": "train/cat/0007.jpg", "reason": "JPEG is cut short"}
                   {"stage": "prepare", "item": "train-000003.tar", "reason": "…", "counted": false}     of no sample
"""

import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from dpkd.errors import UserError, without_secrets
from dpkd.io import storage
from dpkd.io.errors import NO_FILE
from dpkd.io.untrusted import parse_json

NUM_NAMED = 3
"""Items that an error names."""
NUM_SHOWN = 100
"""Items that a table shows."""


class _Entry(NamedTuple):
    reason: str
    counted: bool


class Quarantine:
    """The report of unusable items; written by one process, the one that drives the run."""

    def __init__(self, path: str | Path, *, limit: float) -> None:
        """Continues the report at `path`; `limit` is the largest share of bad items that is put up with."""
        self.path = Path(path)
        self.limit = limit
        text = _text(self.path)
        self._torn = not text.endswith("\n") and text != ""
        self._entries = _read(text)
        self._counts = _count(self._entries)

    @property
    def count(self) -> int:
        """Number of items in the report."""
        return sum(self._counts.values())

    @property
    def counts(self) -> dict[str, int]:
        """Number of items by the stage that reported them, for the stages that reported any."""
        return dict(self._counts)

    def count_of(self, stage: str) -> int:
        """Number of items that one stage reported."""
        return self._counts[stage]

    def begin(self, stage: str) -> None:
        """Forgets what an earlier attempt of `stage` reported: the stage reports again what still holds."""
        kept = {key: entry for key, entry in self._entries.items() if key[0] != stage}
        if len(kept) < len(self._entries):
            storage.write_bytes_atomic(self.path, "".join(_line(*key, kept[key]) for key in kept).encode())
            self._entries, self._counts, self._torn = kept, _count(kept), False

    def add(self, stage: str, item: str, reason: str) -> None:
        """Adds an item once, with one line that says why it is not used; secrets in either are masked."""
        self._add(stage, item, _Entry(reason, counted=True))

    def note(self, stage: str, item: str, reason: str) -> None:
        """Adds a line on what is no sample, such as a damaged shard; the limit does not count it."""
        self._add(stage, item, _Entry(reason, counted=False))

    def check(self, total: int) -> None:
        """Raises `UserError` when more than the limit's share of `total` items is in the report."""
        if self.count <= self.limit * total:
            return
        reasons = [f"{item}: {entry.reason}" for (_, item), entry in self._entries.items() if entry.counted]
        first = "; ".join(reasons[:NUM_NAMED]) + ("; …" if len(reasons) > NUM_NAMED else "")
        raise UserError(
            f"{self.count} of {total} samples cannot be used, more than data.bad_limit={self.limit:g} allows: {first}. "
            f"All are listed in {self.path}: mend or remove them, or raise data.bad_limit"
        )

    def markdown(self) -> str:
        """The first items with their reasons, as a table of Markdown."""
        rows = [(stage, item, entry.reason.replace("|", "/")) for (stage, item), entry in self._entries.items()]
        if not rows:
            return "Nothing was quarantined."
        lines = [f"| {stage} | {item} | {reason} |" for stage, item, reason in rows[:NUM_SHOWN]]
        more = [f"\n… and {len(rows) - NUM_SHOWN:,} more, in {self.path}"] if len(rows) > NUM_SHOWN else []
        return "\n".join(["| stage | item | reason |", "|---|---|---|", *lines, *more])

    def _add(self, stage: str, item: str, entry: _Entry) -> None:
        item, entry = without_secrets(item), entry._replace(reason=without_secrets(entry.reason))
        if (stage, item) in self._entries:
            return
        with storage.write_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n" * self._torn + _line(stage, item, entry))
        self._torn = False
        self._entries[stage, item] = entry
        if entry.counted:
            self._counts[stage] += 1


def _text(path: Path) -> str:
    try:
        return storage.read_bytes(path).decode(errors="replace")
    except FileNotFoundError:
        return ""
    except NO_FILE as error:
        raise UserError(f"{path} is no file, and holds the report of bad items: move away what stands there") from error


def _count(entries: dict[tuple[str, str], _Entry]) -> Counter[str]:
    return Counter(stage for (stage, _), entry in entries.items() if entry.counted)


def _line(stage: str, item: str, entry: _Entry) -> str:
    content: dict[str, object] = {"stage": stage, "item": item, "reason": entry.reason}
    if not entry.counted:
        content["counted"] = False
    return json.dumps(content, ensure_ascii=True) + "\n"


def _read(text: str) -> dict[tuple[str, str], _Entry]:
    entries = {}
    for line in text.splitlines():
        try:
            content = parse_json(line)
            entry = _Entry(str(content["reason"]), counted=content.get("counted", True) is True)
            entries[str(content["stage"]), str(content["item"])] = entry
        except (ValueError, LookupError, TypeError, AttributeError):  # cut short, or not ours: added again
            continue
    return entries
