"""The summary of a run: `summary.json` for programs, `summary.md` and a table on the screen for users.

    summary.json   {"run": folder, "protocol", "splits", "device",
                    "teachers", "live_teachers", "students", "baselines": {name: network},
                    "stages": {stage: {"status", "seconds", "speed": {"images_per_s", "tflops", "mfu"}}},
                    "goodput": as goodput.json, "exports": {student: folder},
                    "quarantine": {stage: number of samples}}
    network        {"parameters", "images_per_s", "few_shot": {split: {"5way_1shot": {"mean", "ci95"}}}, …},
                   as in evaluation.json

`speed` has medians over the log lines of a training stage: TFLOP/s of one device, and their share of its peak if
that is known. Its sources are `evaluation.json`, `stages.json`, `events.jsonl` and `quarantine.jsonl`. Accuracies are
fractions. A number that cannot be measured is shown as a dash, and does not stop the run.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from dpkd.io import storage
from dpkd.io.record import parse_json, read_record
from dpkd.log import EventReader, duration, logger
from dpkd.report.goodput import MEANINGS, TimeAccount
from dpkd.report.quarantine import Quarantine

EVALUATION_NAME = "evaluation.json"
QUARANTINE_NAME = "quarantine.jsonl"
DASH = "–"
OF_MASKS = ("mean_dice", "boundary_iou", "boundary_f", "mean_iou")
"""The keys of the figures of masks; the last is the one by which students are judged."""
KNOWN, MAX_INTERVAL = "known_classes", 0.05
"""The keys of accuracy on known classes and of masks, and the half of a 95 % interval above which a sentence warns."""
KNOWN_CLASSES = "Accuracy on known classes"
UNMEASURED = (
    "nothing was measured, because no image of val or test has a label: `dpkd adapt EXPORT --shots FOLDER` makes a "
    "classifier from a few labelled images and measures it, `dpkd embed` writes embeddings"
)
SPEEDS = ("images_per_s", "tflops", "mfu")

Table = list[list[str]]
Value = TypeVar("Value")


def figure_or_none(name: str, compute: Callable[[], Value]) -> Value | None:
    """The result of `compute`; if it fails, None and a line in the log. `compute` must not wait for other ranks."""
    try:
        return compute()
    except Exception as error:  # noqa: BLE001 (libraries may raise any error for an unusual model)
        cause = (str(error).splitlines() or [""])[0][:200]
        logger.info(f"{name}: none, because of {type(error).__name__}: {cause}")
        return None


def percent(score: dict[str, float], *, sign: str = "") -> str:
    """`{"mean", "ci95"}` as `56.1 ± 0.4 %`; with `sign="+"`, as a signed difference."""
    return f"{100 * score['mean']:{sign}.1f} ± {100 * score['ci95']:.1f} %"


def rate_words(per_s: float | None) -> str:
    """Images per second as text: `1,234`."""
    return DASH if per_s is None else f"{per_s:,.0f}"


def speed_words(numbers: Mapping[str, float]) -> str:
    """The speed of a log line as text: `1,234 images/s, 410 TFLOP/s (41 % of the peak)`."""
    words = f"{numbers['speed/images_per_s']:,.0f} images/s"
    if "speed/tflops" in numbers:
        words += f", {numbers['speed/tflops']:.3g} TFLOP/s"
    return words + (f" ({100 * numbers['speed/mfu']:.0f} % of the peak)" if "speed/mfu" in numbers else "")


def _speeds(events: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """By stage, the median of each speed over its log lines."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for event in events:
        for name in SPEEDS if event.get("kind") == "train" else ():
            if (key := f"speed/{name}") in event:
                found[event["stage"]][name].append(event[key])
    return {stage: {name: median(values) for name, values in speeds.items()} for stage, speeds in found.items()}


def count_words(count: int) -> str:
    """A number of parameters as text: `110 k`, `1.25 M`, `22 M`."""
    if count < 1_000_000:
        return f"{count / 1e3:.0f} k"
    return f"{count / 1e6:.2f} M" if count < 10_000_000 else f"{count / 1e6:.0f} M"


def markdown_table(rows: Table) -> list[str]:
    """The lines of a Markdown table; the first row is its header."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def write_summary(folder: Path) -> dict[str, Any]:
    """Writes `summary.json` and `summary.md` from the results of the stages in the run folder; returns the summary."""
    way_out = "run the stage that writes it again"
    records = read_record(folder / "stages.json", way_out=way_out)
    events = EventReader(folder / "events.jsonl").new()
    stages: dict[str, dict[str, Any]] = {
        name: {key: record[key] for key in ("status", "seconds")} for name, record in records.items()
    }
    for name, speed in _speeds(events).items():
        if name in stages:
            stages[name]["speed"] = speed
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
        first, *others = figure_tables(summary).items()
        lines += [heading(summary), "", *_aligned(first[1])]
        if known := dict(others).get(KNOWN_CLASSES):
            lines += ["", f"{KNOWN_CLASSES}, with the network's own classifier", "", *_aligned(known)]
        notes = [*invalid(summary), *few_images(summary), *not_better(summary).values()]
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
        lines += [figures_markdown(summary), ""]
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


def figures_markdown(evaluation: dict[str, Any]) -> str:
    """The tables and the protocol of an evaluation, as Markdown."""
    first, *others = figure_tables(evaluation).items()
    lines = [heading(evaluation), "", *markdown_table(first[1]), ""]
    for note in (*invalid(evaluation), *few_images(evaluation), *not_better(evaluation).values()):
        lines += [note, ""]
    for title, table in others:
        lines += [f"## {title}", "", *markdown_table(table), ""]
    lines += ["## Protocol", "", *(f"- {key}: {value}" for key, value in evaluation["protocol"].items())]
    return "\n".join(lines)


def figure_tables(evaluation: dict[str, Any]) -> dict[str, Table]:
    """The tables of an evaluation by title, that of few-shot accuracy first, or of accuracy without episodes."""
    titles = {
        "probes": "kNN and linear probe",
        "classification": KNOWN_CLASSES,
        "zero_shot": "Zero-shot through attributes",
    }
    first = "Ranking by label" if "labels" in evaluation["protocol"] else "Accuracy"
    tables = {"Few-shot accuracy" if "way" in evaluation["protocol"] else first: _first_table(evaluation)}
    for key, title in titles.items():
        measured = {name: network[key] for name, network in networks(evaluation).items() if network.get(key)}
        columns = {(split, part): None for table in measured.values() for split in table for part in table[split]}
        rows = [["", *(f"{split} {part}" for split, part in columns)]]
        for name, table in measured.items():
            shares = [table.get(split, {}).get(part) for split, part in columns]
            rows.append([name, *(DASH if share is None else f"{100 * share:.1f} %" for share in shares)])
        tables |= {title: rows} if measured else {}
    return tables | _segmentation_tables(evaluation)


def _segmentation_tables(evaluation: dict[str, Any]) -> dict[str, Table]:
    """By title, IoU, Dice and Hausdorff distance of each class of pixels of a split."""
    tables: dict[str, Table] = {}
    for name, network in networks(evaluation).items():
        for split, classes in network.get("segmentation", {}).items():
            parts = [
                (title, *part) for title in classes for part in (("iou", "IoU"), ("dice", "Dice"), ("hd95_px", "HD95"))
            ]
            header = ["", *(f"{title} {words}" for title, _, words in parts)]
            cells = [
                f"{classes[title][key]:.1f} px" if key == "hd95_px" else f"{100 * classes[title][key]:.1f} %"
                for title, key, _ in parts
            ]
            tables.setdefault(f"Segmentation by class, {split}", [header]).append([name, *cells])
    return tables


def networks(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The table of every network, by the name that users read: each student and its baselines, then the teachers."""
    return {title: network for named in _groups(summary).values() for title, network in named.items()}


def _groups(summary: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """The networks by title: by student, which may have baselines alone, and then the teachers, by an empty name."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for name, student in summary["students"].items():
        groups[name] = {f"student {name}": student}
    for key, baseline in summary["baselines"].items():
        name, _, kind = key.partition(".")
        words = {"": "", "plain": ", plain cross-entropy"}.get(kind, f", {kind[1:]} x steps")
        groups.setdefault(name, {})[f"{name} on {alone(summary)}{words}"] = baseline
    live = {f"{name}, after distilling": teacher for name, teacher in summary.get("live_teachers", {}).items()}
    return groups | {"": summary["teachers"] | live}


def alone(summary: dict[str, Any]) -> str:
    """What the baselines have learnt from, by what is measured: `labels alone`, `masks alone`, or both."""
    figures = (each["few_shot"] for kind in ("students", "baselines") for each in summary[kind].values())
    keys = {key for of_network in figures for scores in of_network.values() for key in scores}
    kinds = ["labels"] * (not keys or not keys <= {*OF_MASKS}) + ["masks"] * bool(keys & {*OF_MASKS})
    return f"{' and '.join(kinds)} alone"


def heading(summary: dict[str, Any]) -> str:
    """What the first table shows."""
    protocol, split = summary["protocol"], report_split(summary)
    by = f"mean ± 95 % interval; images/s on {summary['device']}"
    if "labels" in protocol:
        images = f"{summary['labelled'][split]:,} images of {split}"
        return f"Ranking of {images} by each of {protocol['labels']} labels, {by}"
    if "way" not in protocol and alone(summary) == "masks alone":
        return f"Segmentation of {summary['labelled'][split]:,} images of {split}, {by}"
    if "way" not in protocol:
        return f"Accuracy on {summary['labelled'][split]:,} labelled images of {split}, {by}"
    episodes = f"{protocol['way']} classes an episode, the same {protocol['episodes']:,} episodes for all"
    return f"Few-shot accuracy on {split}: {episodes}, {by}"


def report_split(summary: dict[str, Any]) -> str:
    """The test split, or the validation split if there is no test split."""
    return str(summary["splits"]["test"] or summary["splits"]["val"])


def _first_table(summary: dict[str, Any]) -> Table:
    """The figures of every network on the report split, as it is exported; with its prior map in a row below.

    A student's gain over labels alone follows its baselines. `invalid` explains the stars.
    """
    split = report_split(summary)
    keys = list(dict.fromkeys(key for network in networks(summary).values() for key in network["few_shot"][split]))
    rows = [["", "parameters", "images/s", *map(column_words, keys)]]

    def add(title: str, scores: dict[str, Any], *facts: str, sign: str = "") -> None:
        cells = [percent(scores[split][key], sign=sign) if key in scores[split] else DASH for key in keys]
        rows.append([title, *(facts or ("", "")), *cells])

    for student, named in _groups(summary).items():
        for name, network in named.items():
            title = f"{name} *" if split in network.get("seen", {}) else name
            facts = count_words(network["parameters"]), rate_words(network["images_per_s"])
            add(title, network.get("plain_pooling", network["few_shot"]), *facts)
            if "plain_pooling" in network:
                add("  with its prior map", network["few_shot"])
        if "over_baseline" in summary["students"].get(student, {}):
            gains = summary["students"][student]["over_baseline"]
            add(f"{student}: gain over {alone(summary)}", gains, sign="+")
    return rows


def column_words(key: str) -> str:
    """A kind of figure as text: `5way_1shot` is `1-shot`, and `mean_iou` is `mean IoU`."""
    words = key.rpartition("way_")[2].replace("shot", "-shot").replace("_", " ").replace("boundary f", "boundary F")
    return words.replace("auroc", "AUROC").replace("iou", "IoU").replace("dice", "Dice")


def chart_words(key: str, split: str, *, of: str = "") -> str:
    """What a chart shows, with `of` which networks: `accuracy in %, val, 5-shot`, or `mean IoU in %, test`."""
    if key == KNOWN or key.endswith("shot"):
        return f"accuracy{of} in %, {split}, {column_words(key)}"
    return f"{column_words(key)}{of} in %, {split}"


def judged_by(summary: dict[str, Any]) -> str:
    """The key of the figure that students are judged by: of masks, on known classes, or with most shots."""
    scores = (network["few_shot"][report_split(summary)] for network in networks(summary).values())
    return next((list(keys)[-1] for keys in scores if keys), KNOWN)


def few_images(summary: dict[str, Any]) -> list[str]:
    """A sentence on what the accuracy on known classes can show, where it is of few images."""
    split = report_split(summary)
    intervals = [network["few_shot"][split].get(KNOWN, {}).get("ci95", 0.0) for network in networks(summary).values()]
    if max(intervals, default=0.0) <= MAX_INTERVAL:
        return []
    images, points = summary["labelled"][split], 100 * max(intervals)
    return [f"accuracy on {images:,} images may be off by {points:.0f} points: label more of {split} to know it better"]


def invalid(summary: dict[str, Any]) -> list[str]:
    """A sentence on the networks whose figures are no few-shot figures, because weights were trained on the classes."""
    split = report_split(summary)
    seen = {name: each["seen"][split] for name, each in networks(summary).items() if split in each.get("seen", {})}
    if not seen:
        return []
    classes = sorted({name for names in seen.values() for name in names})
    few = ", ".join(classes[:3]) + (", …" if len(classes) > 3 else "")
    whose = f"{', '.join(seen)} or of a teacher"
    return [
        f"* invalid: by teachers.<name>.seen, weights of {whose} have seen {len(classes)} classes of {split} ({few})"
    ]


def not_better(summary: dict[str, Any]) -> dict[str, str]:
    """A sentence for each student that is not better than its baseline in the figure that it is judged by.

    Where masks are measured, also for one that is better in that figure and worse in another.
    """
    split, sentences = report_split(summary), {}
    for name, student in summary["students"].items():
        if "over_baseline" not in student:
            continue
        gains, baseline = student["over_baseline"][split], f"the same network on {alone(summary)}"
        judged, gain = list(gains.items())[-1]
        worse, better = gain["mean"] < -gain["ci95"], gain["mean"] > gain["ci95"]
        others = [
            f"{column_words(key)} is {'lower' if better else 'higher'} ({percent(other, sign='+')})"
            for key, other in gains.items()
            if key in OF_MASKS and (-other["mean"] if better else other["mean"]) > other["ci95"]
        ]
        but = f", but {' and '.join(others)}" if others else ""
        if better and others:
            figure = f"the {column_words(judged)} of student {name}"
            sentences[name] = f"{figure} is higher than that of {baseline} ({percent(gain, sign='+')}){but}"
        elif not better and not worse and gain["ci95"] > MAX_INTERVAL:
            few = "too few images are measured to tell it from"
            sentences[name] = f"student {name}: {few} {baseline} ({percent(gain, sign='+')}){but}"
        elif not better:
            comparison = "worse than" if worse else "no better than"
            sentences[name] = (
                f"student {name} is {comparison} {baseline} ({percent(gain, sign='+')}){but}: use the network in "
                f"baselines/{student.get('baseline', name)}, or try more steps, more unlabelled images, or a teacher "
                "that is better than this baseline without its prior map"
            )
    return sentences


def _quarantined(summary: dict[str, Any]) -> str:
    """`3 samples (1 in pack, 2 in prepare), named with reasons in runs/a/quarantine.jsonl`."""
    counts = summary["quarantine"]
    total, stages = sum(counts.values()), ", ".join(f"{count:,} in {stage}" for stage, count in counts.items())
    samples = "sample" if total == 1 else "samples"
    return f"{total:,} {samples} ({stages}), named with reasons in {summary['run']}/{QUARANTINE_NAME}"
