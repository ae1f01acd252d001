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
from dpkd.report.figures import DASH, Evaluation, chart_words
from dpkd.report.pictures import sheet
from dpkd.report.summary import UNMEASURED, figure_or_none, time_tables
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
        evaluation = Evaluation(summary)
        scores = {name: evaluation.exported(network) for name, network in evaluation.networks.items()}
        rows = {name: (100 * score["mean"], 100 * score["ci95"]) for name, score in scores.items() if score}
        title = chart_words(evaluation.judged, evaluation.split, of=" as exported")
        content |= {
            "verdicts": evaluation.verdicts(),
            "heading": evaluation.heading,
            "accuracy": interval_chart(rows, title=f"{title[0].upper()}{title[1:]}", gains=False),
            "confusions": confusions(evaluation),
            "notes": evaluation.notes(),
            "figures": evaluation.tables() | evaluation.class_tables(),
        }
    templates = jinja2.Environment(autoescape=True, trim_blocks=True, loader=jinja2.PackageLoader("dpkd", "report"))
    templates.filters["base64"] = lambda data: base64.b64encode(data).decode()
    page = templates.get_template(REPORT_NAME).render(content)
    storage.write_bytes_atomic(folder.path / REPORT_NAME, page.encode())


def confusions(evaluation: Evaluation) -> list[str]:
    """A chart of the most confused classes for each student, on the split of the first table."""
    drawn = []
    for name, student in evaluation.students.items():
        found = student.get("confusion", {}).get(evaluation.split, {"classes": []})
        if found["classes"]:
            title = f"What {name} takes classes for, in %, {evaluation.split}"
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
