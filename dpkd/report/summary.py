"""The summary of a run: `summary.json` for programs, `summary.md` and a table on the screen for users.

    summary.json   {"run": folder, "protocol", "splits", "device",
                    "teachers", "live_teachers", "students", "baselines": {name: network},
                    "stages": {stage: {"status", "seconds", "speed": {"images_per_s", "tflops", "mfu"}}},
                    "goodput": as goodput.json, "exports": {student: folder},
                    "quarantine": {stage: number of samples}}
    network        {"parameters", "images_per_s", "scores": {split: {"5way_1shot": {"mean", "ci95"}}}, …},
                   as in evaluation.json

`speed` has medians over the log lines of a training stage: TFLOP/s of one device, and their share of its peak if
that is known. Its sources are `evaluation.json`, `stages.json`, `events.jsonl` and `quarantine.jsonl`. Accuracies are
fractions. A number that cannot be measured is shown as a dash, and does not stop the run.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from dpkd.io import storage
from dpkd.io.record import parse_json, read_record
from dpkd.log import EventReader, duration, logger
from dpkd.report.figures import DASH, KNOWN_CLASSES, Evaluation, Table, markdown_table
from dpkd.report.goodput import MEANINGS, TimeAccount
from dpkd.report.quarantine import Quarantine

EVALUATION_NAME = "evaluation.json"
QUARANTINE_NAME = "quarantine.jsonl"
UNMEASURED = (
    "nothing was measured, because no image of val or test has a label: `dpkd adapt EXPORT --shots FOLDER` makes a "
    "classifier from a few labelled images and measures it, `dpkd embed` writes embeddings"
)
SPEEDS = ("images_per_s", "tflops", "mfu")

Value = TypeVar("Value")


def figure_or_none(name: str, compute: Callable[[], Value]) -> Value | None:
    """The result of `compute`; if it fails, None and a line in the log. `compute` must not wait for other ranks."""
    try:
        return compute()
    except Exception as error:  # noqa: BLE001 (libraries may raise any error for an unusual model)
        cause = (str(error).splitlines() or [""])[0][:200]
        logger.info(f"{name}: none, because of {type(error).__name__}: {cause}")
        return None


def speed_words(numbers: Mapping[str, float]) -> str:
    """The speed of a log line as text: `1,234 images/s, 410 TFLOP/s (41 % of the peak)`."""
    words = f"{numbers['speed/images_per_s']:,.0f} images/s"
    if "speed/tflops" in numbers:
        words += f", {numbers['speed/tflops']:.3g} TFLOP/s"
    return words + (f" ({100 * numbers['speed/mfu']:.0f} % of the peak)" if "speed/mfu" in numbers else "")


def write_summary(folder: Path) -> dict[str, Any]:
    """Writes `summary.json` and `summary.md` from the results of the stages in the run folder; returns the summary."""
    way_out = "run the stage that writes it again"
    records = read_record(folder / "stages.json", way_out=way_out)
    events = EventReader(folder / "events.jsonl").new()
    stages: dict[str, dict[str, Any]] = {
        name: {key: record[key] for key in ("status", "seconds")} for name, record in records.items()
    }
    speeds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for event in events:
        for name in SPEEDS if event.get("kind") == "train" else ():
            if (key := f"speed/{name}") in event:
                speeds[event["stage"]][name].append(event[key])
    for stage in stages.keys() & speeds.keys():
        stages[stage]["speed"] = {name: median(values) for name, values in speeds[stage].items()}
    exported = {path.name: str(path) for path in sorted((folder / "export").glob("[!.]*")) if path.is_dir()}
    summary = {
        "run": str(folder),
        **read_record(folder / EVALUATION_NAME, way_out=way_out, parse=parse_json),
        "stages": stages,
        "exports": exported,
        "quarantine": Quarantine(folder / QUARANTINE_NAME, limit=1.0).counts,
    }
    account = TimeAccount(events)
    if account.attempts:
        summary["goodput"] = account.table()
    storage.write_bytes_atomic(folder / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())
    storage.write_bytes_atomic(folder / "summary.md", markdown(summary).encode())
    return summary


def final_words(summary: dict[str, Any]) -> str:
    """The last lines of a run on the screen: the table, the exported students, the TensorBoard command."""
    lines = []
    if "protocol" in summary:
        evaluation = Evaluation(summary)
        first, *others = evaluation.tables().items()
        lines += [evaluation.heading, "", *_aligned(first[1])]
        if known := dict(others).get(KNOWN_CLASSES):
            lines += ["", f"{KNOWN_CLASSES}, with the network's own classifier", "", *_aligned(known)]
        notes = [*evaluation.notes(), *evaluation.not_better().values()]
        lines += ["", *notes] if notes else []
    elif summary["exports"]:
        lines.append(UNMEASURED)
    if summary["exports"]:
        lines += ["", "exported students (timm folder, ONNX):", *(f"  {path}" for path in summary["exports"].values())]
    if summary["quarantine"]:
        lines += ["", f"quarantined: {_quarantined(summary)}"]
    lines += [
        "",
        f"summary: {summary['run']}/summary.md, report.html",
        f"curves:  tensorboard --logdir {summary['run']}",
    ]
    return "\n".join(lines)


def _aligned(rows: Table) -> list[str]:
    """The lines of a table on the screen."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [[cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)] for _, *cells in rows]
    return ["  ".join([row[0].ljust(widths[0]), *cells]) for row, cells in zip(rows, aligned, strict=True)]


def markdown(summary: dict[str, Any]) -> str:
    """The content of `summary.md`."""
    lines = [f"# Run {summary['run']}", ""]
    if "protocol" in summary:
        lines += [Evaluation(summary).markdown(), ""]
    for title, table in time_tables(summary).items():
        lines += [f"## {title}", "", *markdown_table(table), ""]
    if summary["quarantine"]:
        lines += ["## Quarantined", "", _quarantined(summary), ""]
    if summary["exports"]:
        lines += ["## Exported students", "", *(f"- {name}: `{path}`" for name, path in summary["exports"].items())]
    return "\n".join(lines).rstrip() + "\n"


def time_tables(summary: dict[str, Any]) -> dict[str, Table]:
    """The stages, and where the time went, by title."""
    stages = [["stage", "status", "time", "speed"]]
    for name, stage in summary["stages"].items():
        speed = {f"speed/{key}": value for key, value in stage.get("speed", {}).items()}
        stages.append([name, stage["status"], duration(stage["seconds"]), speed_words(speed) if speed else DASH])
    if "goodput" not in summary:
        return {"Stages": stages}
    goodput, rows = summary["goodput"], [["", "time", "share", "what it is"]]
    for name, meaning in sorted(MEANINGS.items(), key=lambda item: -goodput["seconds"][item[0]]):
        if seconds := goodput["seconds"][name]:
            rows.append([name.replace("_", " "), duration(seconds), f"{100 * goodput['shares'][name]:.1f} %", meaning])
    counts = [f"{goodput[kind]} {kind if goodput[kind] != 1 else kind[:-1]}" for kind in ("attempts", "restarts")]
    counts.append(f"{goodput['steps']:,} steps that count, {goodput['lost_steps']:,} lost")
    rows.append(["all", duration(goodput["total_s"]), "100 %", ", ".join(counts)])
    return {"Stages": stages, "Where the time went": rows}


def _quarantined(summary: dict[str, Any]) -> str:
    """`3 samples (1 in pack, 2 in prepare), named with reasons in runs/a/quarantine.jsonl`."""
    counts = summary["quarantine"]
    total, stages = sum(counts.values()), ", ".join(f"{count:,} in {stage}" for stage, count in counts.items())
    samples = "sample" if total == 1 else "samples"
    return f"{total:,} {samples} ({stages}), named with reasons in {summary['run']}/{QUARANTINE_NAME}"
