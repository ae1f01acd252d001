"""What could not be used, by name and reason: a JSON line each, and the limit past which a run stops.

quarantine.jsonl:  {"stage": "pack", "item": "train/cat/0007.jpg", "reason": "JPEG is cut short"}
"""

import json
from pathlib import Path

from dpkd import storage
from dpkd.errors import UserError, without_secrets
from dpkd.untrusted import parse_json

NUM_NAMED = 3


class Quarantine:
    """The report of unusable items; written by one process, the one that drives the run."""

    def __init__(self, path: str | Path, *, limit: float) -> None:
        """Continues the report at `path`; `limit` is the largest share of bad items that is put up with."""
        self.path = Path(path)
        self.limit = limit
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        self._torn = not text.endswith("\n") and text != ""
        self._reason_of = _read(text)

    @property
    def count(self) -> int:
        """Number of items in the report."""
        return len(self._reason_of)

    def count_of(self, stage: str) -> int:
        """Number of items that one stage reported."""
        return sum(key[0] == stage for key in self._reason_of)

    def begin(self, stage: str) -> None:
        """Forgets what an earlier attempt of `stage` reported: the stage reports again what still holds."""
        kept = {key: reason for key, reason in self._reason_of.items() if key[0] != stage}
        if len(kept) < self.count:
            storage.write_bytes_atomic(self.path, "".join(_line(*key, kept[key]) for key in kept).encode())
            self._reason_of, self._torn = kept, False

    def add(self, stage: str, item: str, reason: str) -> None:
        """Adds an item once, with one line that says why it is not used; secrets in either are masked."""
        item, reason = without_secrets(item), without_secrets(reason)
        if (stage, item) in self._reason_of:
            return
        with storage.write_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n" * self._torn + _line(stage, item, reason))
        self._torn = False
        self._reason_of[stage, item] = reason

    def check(self, total: int) -> None:
        """Raises `UserError` when more than the limit's share of `total` items is in the report."""
        if self.count <= self.limit * total:
            return
        first = "; ".join(f"{item}: {why}" for (_, item), why in list(self._reason_of.items())[:NUM_NAMED])
        raise UserError(
            f"{self.count} of {total} samples cannot be used, more than data.bad_limit={self.limit:g} allows: {first}"
            f"{'; …' if self.count > NUM_NAMED else ''}. All are listed in {self.path}: mend or remove them, "
            "or raise data.bad_limit"
        )


def _line(stage: str, item: str, reason: str) -> str:
    return json.dumps({"stage": stage, "item": item, "reason": reason}, ensure_ascii=True) + "\n"


def _read(text: str) -> dict[tuple[str, str], str]:
    reason_of = {}
    for line in text.splitlines():
        try:
            entry = parse_json(line)
            reason_of[str(entry["stage"]), str(entry["item"])] = str(entry["reason"])
        except (ValueError, LookupError, TypeError):  # noqa: PERF203 (cut by a kill, or not ours: it is added again)
            continue
    return reason_of
