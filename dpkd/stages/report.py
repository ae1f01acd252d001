"""`report.html`: a run on one page, for a browser without network access.

It has what `summary.md` says, curves from `events.jsonl`, samples with their prior maps, settings and versions. It has
no script, loads nothing, and names samples by their keys.
"""

import base64
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import jinja2
import yaml

from dpkd.data.images import decode_image
from dpkd.data.shards import Dataset
from dpkd.errors import UserError
from dpkd.io import storage
from dpkd.io.record import parse_json, read_record
from dpkd.log import EventReader
from dpkd.priors.store import PriorSet
from dpkd.report.charts import Point, confusion_chart, interval_chart, line_chart
from dpkd.report.pictures import sheet
from dpkd.report.summary import (
    DASH,
    KNOWN,
    UNMEASURED,
    Table,
    alone,
    chart_words,
    column_words,
    few_images,
    figure_or_none,
    figure_tables,
    heading,
    invalid,
    judged_by,
    networks,
    not_better,
    percent,
    report_split,
    time_tables,
)
from dpkd.run.folder import RunFolder
from dpkd.settings import Settings
from dpkd.stages.plan import dataset_url

REPORT_NAME = "report.html"
NUM_SHOWN = 4
"""Number of samples in a picture, if no keys are given."""
NUM_POINTS = 300
"""Most points of a line."""


def write_report(settings: Settings, summary: dict[str, Any]) -> None:
    """Writes `report.html` into the run folder from its summary, its events and its data set."""
    folder = RunFolder(settings.run.dir)
    shards = dataset_url(folder, settings.data)
    versions = read_record(folder.path / "versions.json", way_out="the next run writes it", parse=parse_json)
    content: dict[str, Any] = {
        "title": f"dpkd run {folder.path.name}",
        "folder": str(folder.path),
        "quarantine": summary["quarantine"],
        "curves": curves(EventReader(folder.events).new()),
        "ledger": [path.read_bytes() for path in sorted(Path(f"{folder.path}-ledger").glob("*.svg"))],
        "samples": figure_or_none(
            "samples of the report", lambda: sample_sheet(shards, set_name=settings.prepare.name)
        ),
        "masks": [path.read_bytes() for path in sorted(folder.path.glob("masks-*.png"))],
        "times": time_tables(summary),
        "exports": summary["exports"],
        "settings": yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        "protocol": [["setting", "value"], *([key, str(value)] for key, value in summary.get("protocol", {}).items())],
        "versions": [["package", "version"], *([name, version or DASH] for name, version in versions.items())],
        "figures": {},
        "unmeasured": UNMEASURED if summary["exports"] else "no student was evaluated in this run",
    }
    if "protocol" in summary:
        scores = {name: _exported(summary, network) for name, network in networks(summary).items()}
        rows = {name: (100 * score["mean"], 100 * score["ci95"]) for name, score in scores.items() if score}
        title = chart_words(judged_by(summary), report_split(summary), of=" as exported")
        content |= {
            "verdicts": verdicts(summary),
            "heading": heading(summary),
            "accuracy": interval_chart(rows, title=f"{title[0].upper()}{title[1:]}", gains=False),
            "confusions": confusions(summary),
            "notes": [*invalid(summary), *few_images(summary)],
            "figures": figure_tables(summary) | class_tables(summary),
        }
    templates = jinja2.Environment(autoescape=True, trim_blocks=True, loader=jinja2.PackageLoader("dpkd", "report"))
    templates.filters["base64"] = lambda data: base64.b64encode(data).decode()
    page = templates.get_template(REPORT_NAME).render(content)
    storage.write_bytes_atomic(folder.path / REPORT_NAME, page.encode())


def _exported(summary: dict[str, Any], network: Mapping[str, Any]) -> dict[str, float] | None:
    """The accuracy of a network as it is exported, of the kind that students are judged by, if it has it."""
    scores: dict[str, dict[str, float]] = network.get("plain_pooling", network["few_shot"])[report_split(summary)]
    return scores.get(judged_by(summary))


def verdicts(summary: dict[str, Any]) -> list[tuple[str, bool]]:
    """What each exported student reaches, and what to do if that is little; and whether it is above labels alone."""
    split, protocol, worse, found = report_split(summary), summary["protocol"], not_better(summary), []
    of_what = f"recognises {{}} of the {summary['labelled'][split]:,} labelled images of {split}"
    if (judged := judged_by(summary)).startswith("mean_"):
        of_what = f"reaches a {column_words(judged)} of {{}} on {summary['labelled'][split]:,} images of {split}"
    elif judged != KNOWN:
        shots = max(protocol["shots"])
        of_what = f"recognises {{}} of the images of {protocol['way']} classes from {shots} labelled images of each"
        of_what += f" ({split})"
    for name, student in summary["students"].items():
        exported = _exported(summary, student)
        text = f"Student {name}, as exported, {of_what.format(percent(exported) if exported else DASH)}."
        if name in worse:
            text += f" {worse[name][0].upper()}{worse[name][1:]}."
        elif "over_baseline" in student:
            gain = percent(list(student["over_baseline"][split].values())[-1], sign="+")
            text += f" That is {gain.replace('%', 'points')} over the same network trained on {alone(summary)}."
        found.append((text, "over_baseline" in student and name not in worse))
    return found


def class_tables(summary: dict[str, Any]) -> dict[str, Table]:
    """By title, the accuracy of each class of a split that the networks know; the worst class of the first is first.

    Where an image may have several labels, the average precision and the AUROC of each label.
    """
    tables = {}
    for split in filter(None, summary["splits"].values()):
        several, measured = (
            {name: each[kind][split] for name, each in networks(summary).items() if split in each.get(kind, {})}
            for kind in ("labels", "per_class")
        )
        if several:
            name, first = next(iter(several.items()))
            rows = [["label", "images", "visible in training", *several, f"AUROC of {name}"]]
            for label in sorted(first, key=lambda label: first[label]["trained"]):
                scores = [labels[label]["precision"] for labels in several.values()] + [first[label]["auroc"]]
                cells = [DASH if score is None else percent(score) for score in scores]
                rows.append([label, f"{first[label]['samples']:,}", f"{first[label]['trained']:,}", *cells])
            tables[f"Average precision by label, {split}"] = rows
        if measured:
            name, first = next(iter(measured.items()))
            rows = [["class", "labels", "samples", *measured, f"{name}, 95 %", "takes it for", "such as"]]
            for label in sorted(first, key=lambda label: first[label]["accuracy"]):
                of, (low, high) = first[label], first[label]["ci95"]
                shares = [f"{100 * classes[label]['accuracy']:.1f} %" for classes in measured.values()]
                row = [label, f"{of['train']:,}", f"{of['samples']:,}", *shares, f"{100 * low:.0f} to {100 * high:.0f}"]
                rows.append([*row, of["mistaken_for"] or DASH, ", ".join(of["examples"]) or DASH])
            tables[f"Accuracy by class, {split}"] = rows
    return tables


def confusions(summary: dict[str, Any]) -> list[str]:
    """A chart of the most confused classes for each student, on the report split."""
    drawn = []
    for name, student in summary["students"].items():
        found = student.get("confusion", {}).get(report_split(summary), {"classes": []})
        if found["classes"]:
            title = f"What {name} takes classes for, in %, {report_split(summary)}"
            drawn.append(confusion_chart([*found["classes"], "others"], found["counts"], title=title))
    return drawn


def curves(events: Iterable[Mapping[str, Any]]) -> list[str]:
    """A chart of accuracy for each stage, and of the losses of each network; of steps done twice the last."""
    charts: dict[str, dict[str, dict[int, Point]]] = defaultdict(lambda: defaultdict(dict))
    for event in events:
        if event["kind"] == "evaluated" and event["scores"]:
            key, score = list(event["scores"].items())[-1]
            title = f"{event['stage']}: {chart_words(key, event['split'])}"
            point = (event["step"], 100 * score["mean"], 100 * score["ci95"])
            charts[title][event["network"]][event["step"]] = point
        for key, value in event.items() if event["kind"] == "train" else ():
            if key.startswith("loss/") and math.isfinite(value):
                _, network, objective = key.split("/", 2)
                charts[f"{event['stage']}: loss of {network}"][objective][event["step"]] = (event["step"], value, 0.0)
    drawn = []
    for title, lines in sorted(charts.items(), key=lambda chart: "loss of" in chart[0]):
        thinned = {}
        for name, points in lines.items():
            by_step = sorted(points.values())
            thinned[name] = by_step[:: math.ceil(len(by_step) / NUM_POINTS)]
        drawn.append(line_chart(thinned, title=title, x_title="step"))
    return drawn


def sample_sheet(url: str, *, set_name: str, keys: Sequence[str] = ()) -> tuple[Sequence[str], bytes]:
    """The keys of some samples, by default a few of all splits, and a PNG of them with all their maps.

    Raises `UserError` for a key that no split has, and if the data set or the prior set cannot be read.
    """
    dataset, priors = Dataset.open(url), PriorSet.open(url, set_name)
    splits = {name: dataset.split(name) for name in dataset.manifest.splits}
    places = {key: (name, i) for name, split in splits.items() for i, key in enumerate(split.keys)}
    for key in keys:
        if key not in places:
            raise UserError(f"{url} has no sample {key!r}; a key is an image's path without its extension")
    lost = {(name, i) for name in splits for i in priors.unreadable(name).tolist()}
    readable = [key for key, place in places.items() if place not in lost]
    count = min(NUM_SHOWN, len(readable))
    chosen = keys or [readable[(2 * k + 1) * len(readable) // (2 * count)] for k in range(count)]
    samples = []
    for name, i in map(places.__getitem__, chosen):
        sample = splits[name].read(i)
        maps = priors.split(name).only(priors.channels).read(i, sample)
        samples.append((decode_image(sample.image), maps))
    done, png = cv2.imencode(".png", cv2.cvtColor(sheet(samples), cv2.COLOR_RGB2BGR))
    assert done, "OpenCV could not write a PNG"
    return chosen, png.tobytes()
