"""The list of unusable items, one JSON line each with name and reason, and the limit above which a run stops.

quarantine.jsonl:  {"stage": "pack", "item": "train/cat/0007.jpg", "reason": "JPEG is cut short"}
                   {"stage": "prepare", "item": "train-000003.tar", "reason": "…", "counted": false}     no sample
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from dpkd.errors import UserError, without_secrets
from dpkd.io import storage
from dpkd.log import EventReader, append_json
from dpkd.report.figures import markdown_table

NUM_NAMED = 3
"""Number of items in an error message."""
NUM_SHOWN = 100
"""Number of items in a table."""


class Quarantine:
    """The report of unusable items; only the driver of the run writes it."""

    def __init__(self, path: str | Path, *, limit: float) -> None:
        """Continues the report at `path`; `limit` is the largest share of bad items that does not stop a run."""
        self.path, self.limit = Path(path), limit
        # the reader skips a line that a kill has cut: the stage adds the item again
        self._entries: dict[tuple[str, str], dict[str, Any]] = {
            (entry["stage"], entry["item"]): entry for entry in EventReader(self.path).new()
        }

    @property
    def count(self) -> int:
        """The number of samples in the report."""
        return sum(self.counts.values())

    @property
    def counts(self) -> dict[str, int]:
        """The number of samples by stage, for the stages that reported any."""
        return dict(Counter(stage for (stage, _), entry in self._entries.items() if "counted" not in entry))

    def begin(self, stage: str) -> None:
        """Removes the entries of an earlier attempt of `stage`; the stage reports them again if they still hold."""
        entries = {key: entry for key, entry in self._entries.items() if key[0] != stage}
        if len(entries) < len(self._entries):
            lines = "".join(json.dumps(entry) + "\n" for entry in entries.values())
            storage.write_bytes_atomic(self.path, lines.encode())
            self._entries = entries

    def add(self, stage: str, item: str, reason: str, *, counted: bool = True) -> None:
        """Adds an item once, with the reason in one line; masks secrets in both.

        Items that are not samples, such as a damaged shard, are not `counted` towards the limit.
        """
        item = without_secrets(item)
        if (stage, item) in self._entries:
            return
        entry: dict[str, Any] = {"stage": stage, "item": item, "reason": without_secrets(reason)}
        if not counted:
            entry["counted"] = False
        append_json(self.path, entry)
        self._entries[stage, item] = entry

    def check(self, total: int) -> None:
        """Raises `UserError` if the report holds more than the allowed share of `total` samples."""
        if self.count <= self.limit * total:
            return
        reasons = [f"{item}: {entry['reason']}" for (_, item), entry in self._entries.items() if "counted" not in entry]
        first = "; ".join(reasons[:NUM_NAMED]) + ("; …" if len(reasons) > NUM_NAMED else "")
        raise UserError(
            f"{self.count} of {total} samples cannot be used, more than data.bad_limit={self.limit:g} allows: {first}. "
            f"All are listed in {self.path}: repair or remove them, or raise data.bad_limit"
        )

    def markdown(self) -> str:
        """The first items with their reasons, as a Markdown table."""
        if not self._entries:
            return "Nothing was quarantined."
        shown = list(self._entries.values())[:NUM_SHOWN]
        rows = [[entry["stage"], entry["item"], entry["reason"].replace("|", "/")] for entry in shown]
        lines = markdown_table([["stage", "item", "reason"], *rows])
        if len(self._entries) > NUM_SHOWN:
            lines.append(f"\n… and {len(self._entries) - NUM_SHOWN:,} more, in {self.path}")
        return "\n".join(lines)
