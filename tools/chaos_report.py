"""Prints what the chaos suite did, from the file in which its faults are recorded.

    python tools/chaos_report.py build/chaos.jsonl

A row a suite and kind of fault: how many were injected and survived, the seconds until the run was at work again, and
the steps that were done again; a test that failed has a row too, as one fault that was not survived. Exits with 1 where
there are such, and names them.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

HEAD = ("suite", "fault", "injected", "survived", "recovery s, median", "max", "steps lost, max")


def main() -> int:
    """Prints the table of one file."""
    parser = argparse.ArgumentParser(description="What the chaos suite did.")
    parser.add_argument("file", type=Path)
    path = parser.parse_args().file
    if not path.exists():
        print(f"{path}: no fault was recorded")
        return 1
    faults = [json.loads(line) for line in path.read_text().splitlines()]
    print("\n".join(table(faults)))
    lost = [fault for fault in faults if fault["outcome"] != "survived"]
    for fault in lost:
        print(f"not survived: {json.dumps(fault)}")
    return 1 if lost else 0


def table(faults: list[dict[str, Any]]) -> list[str]:
    """The lines of a table in Markdown: a row a suite and kind of fault, and the sum of all."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for fault in faults:
        groups.setdefault((fault["suite"], fault["fault"]), []).append(fault)
    rows = [(*name, *_counts(group)) for name, group in sorted(groups.items())]
    lines = [_line(HEAD), _line(("---",) * len(HEAD))]
    return [*lines, *(_line(row) for row in rows), _line(("all", "", *_counts(faults)))]


def _counts(faults: list[dict[str, Any]]) -> tuple[str, ...]:
    survived = sum(fault["outcome"] == "survived" for fault in faults)
    seconds = [fault["recovery_s"] for fault in faults if fault["recovery_s"] is not None]
    steps = [fault["lost_steps"] for fault in faults if fault["lost_steps"] is not None]
    times = (f"{median(seconds):.1f}", f"{max(seconds):.1f}") if seconds else ("", "")
    return (f"{len(faults):,}", f"{survived:,}", *times, str(max(steps)) if steps else "")


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
