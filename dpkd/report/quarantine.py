"""What could not be used, by name and reason: a JSON line each, and the limit past which a run stops.

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

NUM_NAMED = 3
"""Items that an error names."""
NUM_SHOWN = 100
"""Items that a table shows."""


class Quarantine:
    """The report of unusable items; written by one process, the one that drives the run."""

    def __init__(self, path: str | Path, *, limit: float) -> None:
        """Continues the report at `path`; `limit` is the largest share of bad items that does not stop a run."""
        self.path, self.limit = Path(path), limit
        # a line that a kill has torn is left out: the stage adds its item again
        self._entries: dict[tuple[str, str], dict[str, Any]] = {
            (entry["stage"], entry["item"]): entry for entry in EventReader(self.path).new()
        }

    @property
    def count(self) -> int:
        """Number of samples in the report."""
        return sum(self.counts.values())

    @property
    def counts(self) -> dict[str, int]:
        """Number of samples by the stage that reported them, for the stages that reported any."""
        return dict(Counter(stage for (stage, _), entry in self._entries.items() if "counted" not in entry))

    def begin(self, stage: str) -> None:
        """Removes what an earlier attempt of `stage` reported: the stage reports again what still holds."""
        kept = {key: entry for key, entry in self._entries.items() if key[0] != stage}
        if len(kept) < len(self._entries):
            lines = "".join(json.dumps(entry) + "\n" for entry in kept.values())
            storage.write_bytes_atomic(self.path, lines.encode())
            self._entries = kept

    def add(self, stage: str, item: str, reason: str, *, counted: bool = True) -> None:
        """Adds an item once, with one line that says why it is not used; secrets in either are masked.

        The limit does not count what is no sample, such as a damaged shard.
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
        """Raises `UserError` when more than the limit's share of `total` items is in the report."""
        if self.count <= self.limit * total:
            return
        reasons = [f"{item}: {entry['reason']}" for (_, item), entry in self._entries.items() if "counted" not in entry]
        first = "; ".join(reasons[:NUM_NAMED]) + ("; …" if len(reasons) > NUM_NAMED else "")
        raise UserError(
            f"{self.count} of {total} samples cannot be used, more than data.bad_limit={self.limit:g} allows: {first}. "
            f"All are listed in {self.path}: mend or remove them, or raise data.bad_limit"
        )

    def markdown(self) -> str:
        """The first items with their reasons, as a table of Markdown."""
        if not self._entries:
            return "Nothing was quarantined."
        lines = ["| stage | item | reason |", "|---|---|---|"]
        for (stage, item), entry in list(self._entries.items())[:NUM_SHOWN]:
            lines.append(f"| {stage} | {item} | {entry['reason'].replace('|', '/')} |")
        if len(self._entries) > NUM_SHOWN:
            lines.append(f"\n… and {len(self._entries) - NUM_SHOWN:,} more, in {self.path}")
        return "\n".join(lines)
