"""The summary of a run: `summary.json` for programs, `summary.md` and a table on the screen for people.

    summary.json   {"run": folder, "protocol", "splits", "device",
                    "teacher": network, "students": {name: network}, "baselines": {name: network},
                    "stages": {stage: {"status", "seconds"}}, "goodput": as goodput.json, "exports": {student: folder},
                    "quarantine": {stage: number of samples}}
    network        {"parameters", "images_per_s", "few_shot": {split: {"5way_1shot": {"mean", "ci95"}}}, …}

It is put together from `evaluation.json`, `stages.json`, `events.jsonl` and `quarantine.jsonl`; accuracies are
fractions.
"""

import json
from pathlib import Path
from typing import Any

from dpkd.errors import UserError
from dpkd.io import storage
from dpkd.io.errors import NO_FILE
from dpkd.io.untrusted import parse_json
from dpkd.log import EventReader, duration, logger
from dpkd.report.goodput import MEANINGS, WORDS, account
from dpkd.report.quarantine import Quarantine

EVALUATION_NAME = "evaluation.json"
STAGES_NAME = "stages.json"
QUARANTINE_NAME = "quarantine.jsonl"
EVENTS_NAME = "events.jsonl"

Table = list[list[str]]


def write_summary(folder: Path) -> dict[str, Any]:
    """Writes `summary.json` and `summary.md` from what the stages left in the run folder; returns the summary."""
    evaluation = _read(folder / EVALUATION_NAME)
    stages = {
        name: {"status": record["status"], "seconds": record["seconds"]}
        for name, record in _read(folder / STAGES_NAME).items()
    }
    exported = {path.name: str(path) for path in sorted((folder / "export").glob("[!.]*")) if path.is_dir()}
    quarantined = Quarantine(folder / QUARANTINE_NAME, limit=1.0).counts
    summary = {"run": str(folder), **evaluation, "stages": stages, "exports": exported, "quarantine": quarantined}
    where_time_went = account(EventReader(folder / EVENTS_NAME).new())
    if where_time_went.attempts:
        summary["goodput"] = where_time_went.table()
    storage.write_bytes_atomic(folder / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())
    storage.write_bytes_atomic(folder / "summary.md", markdown(summary).encode())
    return summary


def say_summary(folder: Path) -> None:
    """Writes the summary and prints what a run ends with."""
    logger.info(final_words(write_summary(folder)))


def final_words(summary: dict[str, Any]) -> str:
    """What a run ends with on the screen: the table, the exported students, the TensorBoard command."""
    lines = []
    if "teacher" in summary:
        lines += [_heading(summary), "", *_aligned(_table(summary))]
    if summary["exports"]:
        lines += ["", "exported students (timm folder, ONNX):", *(f"  {path}" for path in summary["exports"].values())]
    if summary["quarantine"]:
        lines += ["", f"quarantined: {_quarantined(summary)}"]
    lines += ["", f"summary: {summary['run']}/summary.md", f"curves:  tensorboard --logdir {summary['run']}"]
    return "\n".join(lines)


def markdown(summary: dict[str, Any]) -> str:
    """The content of `summary.md`."""
    lines = [f"# Run {summary['run']}", ""]
    if "teacher" in summary:
        lines += [figures_markdown(summary), ""]
    lines += ["## Stages", ""]
    lines += _piped(
        [["stage", "status", "time"]]
        + [[name, stage["status"], duration(stage["seconds"])] for name, stage in summary["stages"].items()]
    )
    if "goodput" in summary:
        lines += ["", "## Where the time went", "", *_piped(_time_table(summary["goodput"]))]
    if summary["quarantine"]:
        lines += ["", "## Quarantined", "", _quarantined(summary)]
    if summary["exports"]:
        lines += ["", "## Exported students", "", *(f"- {name}: `{path}`" for name, path in summary["exports"].items())]
    return "\n".join(lines) + "\n"


def _time_table(goodput: dict[str, Any]) -> Table:
    """The account of `goodput.json`, largest first, what took no time left out."""
    rows = [["", "time", "share", "what it is"]]
    for name, seconds in sorted(goodput["seconds"].items(), key=lambda item: -item[1]):
        if seconds:
            rows.append([WORDS[name], duration(seconds), f"{100 * goodput['shares'][name]:.1f} %", MEANINGS[name]])
    attempts, restarts = goodput["attempts"], goodput["restarts"]
    counted = f"{attempts} attempt{'' if attempts == 1 else 's'}, {restarts} restart{'' if restarts == 1 else 's'}"
    steps = f"{goodput['steps']:,} steps that count, {goodput['lost_steps']:,} lost"
    return [*rows, ["all", duration(goodput["total_s"]), "100 %", f"{counted}, {steps}"]]


def _quarantined(summary: dict[str, Any]) -> str:
    """`3 samples (1 in pack, 2 in prepare), named with reasons in runs/a/quarantine.jsonl`."""
    counts = summary["quarantine"]
    total, stages = sum(counts.values()), ", ".join(f"{count:,} in {stage}" for stage, count in counts.items())
    samples = "sample" if total == 1 else "samples"
    return f"{total:,} {samples} ({stages}), named with reasons in {summary['run']}/{QUARANTINE_NAME}"


def figures_markdown(evaluation: dict[str, Any]) -> str:
    """The tables of an evaluation, and how they were measured."""
    lines = [_heading(evaluation), "", *_piped(_table(evaluation)), ""]
    lines += _more(evaluation, title="kNN and linear probe", key="probes")
    lines += _more(evaluation, title="Accuracy on known classes", key="classification")
    lines += _more(evaluation, title="Zero-shot through attributes", key="zero_shot")
    lines += ["## Protocol", "", *(f"- {key}: {value}" for key, value in evaluation["protocol"].items())]
    return "\n".join(lines)


def networks(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every network's table under the name that people read."""
    named = {"teacher": summary["teacher"]}
    if "live_teacher" in summary:
        named["teacher, after distilling"] = summary["live_teacher"]
    for name, student in summary["students"].items():
        named[f"student {name}"] = student
        if name in summary["baselines"]:
            named[f"{name} on labels alone"] = summary["baselines"][name]
    return named


def _heading(summary: dict[str, Any]) -> str:
    protocol, split = summary["protocol"], summary["splits"]["test"]
    return (
        f"Few-shot accuracy on {split}: {protocol['way']} classes an episode, the same {protocol['episodes']:,} "
        f"episodes for all, mean ± 95 % interval; images/s on {summary['device']}"
    )


def _table(summary: dict[str, Any]) -> Table:
    split = summary["splits"]["test"]
    settings = list(summary["teacher"]["few_shot"][split])
    rows = [["", "parameters", "images/s", *(_shot(key) for key in settings)]]
    for name, network in networks(summary).items():
        scores = network["few_shot"][split]
        head = [name, count_words(network["parameters"]), f"{network['images_per_s']:,.0f}"]
        rows.append([*head, *(percent(scores[key]) for key in settings)])
        if "plain_pooling" in network:
            plain = network["plain_pooling"][split]
            rows.append(["  without its prior map", "", "", *(percent(plain[key]) for key in settings)])
    for name, student in summary["students"].items():
        if "over_baseline" in student:
            gain = student["over_baseline"][split]
            rows.append(
                [f"{name}: gain over labels alone", "", "", *(percent(gain[key], sign="+") for key in settings)]
            )
    return rows


def _more(summary: dict[str, Any], *, title: str, key: str) -> list[str]:
    """A section of figures without intervals, by network and split; nothing where no network has them."""
    found = {name: network[key] for name, network in networks(summary).items() if network.get(key)}
    if not found:
        return []
    columns = [(split, name) for split, table in next(iter(found.values())).items() for name in table]
    rows = [["", *(f"{split} {name}" for split, name in columns)]]
    for name, splits in found.items():
        rows.append([name, *(f"{100 * splits[split][each]:.1f} %" for split, each in columns)])
    return [f"## {title}", "", *_piped(rows), ""]


def percent(score: dict[str, float], *, sign: str = "") -> str:
    """`{"mean", "ci95"}` as `56.1 ± 0.4 %`; with `sign="+"`, as a signed difference."""
    return f"{100 * score['mean']:{sign}.1f} ± {100 * score['ci95']:.1f} %"


def count_words(count: int) -> str:
    """A number of parameters in words: `110 k`, `1.25 M`, `22 M`."""
    if count < 1_000_000:
        return f"{count / 1e3:.0f} k"
    return f"{count / 1e6:.2f} M" if count < 10_000_000 else f"{count / 1e6:.0f} M"


def _shot(key: str) -> str:
    return key.split("_")[1].replace("shot", "-shot")


def _aligned(rows: Table) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]


def _piped(rows: Table) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = parse_json(storage.read_bytes(path))
        if not isinstance(content, dict):
            raise ValueError("it is no object")  # noqa: TRY004 (a fault of the file)
    except FileNotFoundError:
        return {}
    except (*NO_FILE, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); run the stage that writes it again") from error
    return content
