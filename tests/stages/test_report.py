"""`report.html`: its figures are those of the summary, all text is escaped, and a browser opens it without an error."""

import copy
import json
import re
import shutil
import subprocess
from base64 import b64encode
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from dpkd.io.record import checked
from dpkd.report.summary import write_summary
from dpkd.stages.report import REPORT_NAME, curves, write_report
from dpkd.stages.run import Run

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
EVIL = "<script>alert('x')</script>&\""


class Page(HTMLParser):
    """The tables of a page, by the heading before them, and the sources of its pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables, self.sources, self._heading, self._inside = dict[str, list[list[str]]](), list[str](), "", ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        if tag == "tr":
            self.tables.setdefault(self._heading, []).append([])
        elif tag in ("td", "th"):
            self.tables[self._heading][-1].append("")
        elif tag == "h2":
            self._heading = ""
        self.sources += [str(value) for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        if self._inside == "h2":
            self._heading += data
        elif self._inside in ("td", "th"):
            self.tables[self._heading][-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""


@pytest.fixture
def summary(evaluated_run: Run) -> dict[str, Any]:
    folder = evaluated_run.folder.path
    lines = [{"kind": "train", "stage": "teach", "step": step, "loss/teacher/supervised": 1 / step} for step in (1, 2)]
    (folder / "events.jsonl").write_text("".join(json.dumps({"time": 1.0, **line}) + "\n" for line in lines))
    (folder / "stages.json").write_bytes(checked({"pack": {"status": "done", "seconds": 3.25, "given": {}}}))
    return write_summary(folder)


def written(run: Run, summary: Mapping[str, Any]) -> str:
    write_report(run.settings, dict(summary))
    return (run.folder.path / REPORT_NAME).read_text()


def test_the_figures_are_those_of_the_summary(evaluated_run: Run, summary: dict[str, Any]) -> None:
    page = Page(written(evaluated_run, summary))
    rows = {row[0].strip(" *"): row[1:] for row in page.tables["Few-shot accuracy"]}
    assert rows[""] == ["parameters", "images/s", "1-shot", "5-shot"]
    for name in ("conv", "vit"):
        student = json.loads((evaluated_run.folder.path / "summary.json").read_text())["students"][name]
        scores = student.get("plain_pooling", student["scores"])["novel"]
        shown = [f"{100 * scores[key]['mean']:.1f} ± {100 * scores[key]['ci95']:.1f} %" for key in scores]
        assert rows[f"student {name}"][-2:] == shown
    text = written(evaluated_run, summary)
    assert f"Student conv, as exported, recognises {rows['student conv'][-1]} of the images of 4 classes from 5" in text
    assert ["pack", "done", "3 s", "–"] in page.tables["Stages"]
    assert "teach: loss of teacher" in text
    assert "seed: 7" in text  # the settings


def test_a_gain_is_told_and_a_student_that_is_worse_with_what_to_do(
    evaluated_run: Run, summary: dict[str, Any]
) -> None:
    changed = copy.deepcopy(summary)
    changed["students"]["conv"]["over_baseline"]["novel"]["4way_5shot"] = {"mean": 0.031, "ci95": 0.002}
    text = written(evaluated_run, changed)
    assert "That is +3.1 ± 0.2 points over the same network trained on labels alone." in text
    changed["students"]["conv"]["over_baseline"]["novel"]["4way_5shot"] = {"mean": -0.031, "ci95": 0.002}
    text = written(evaluated_run, changed)
    assert "Student conv is worse than the same network on labels alone (-3.1 ± 0.2 %): use the network in" in text
    assert "That is -3.1" not in text


def test_the_page_loads_nothing_and_escapes_all_text(evaluated_run: Run, summary: dict[str, Any]) -> None:
    changed = copy.deepcopy(summary)
    known = {
        EVIL: {"train": 7, "samples": 4, "accuracy": 0.25, "mistaken_for": EVIL, "ci95": [0.046, 0.699]}
        | {"examples": [EVIL]},
        "b": {"train": 9, "samples": 1200, "accuracy": 0.125, "mistaken_for": None, "ci95": [0.11, 0.145]}
        | {"examples": []},
    }
    changed["students"][EVIL] = changed["students"].pop("conv") | {"per_class": {"novel": known}}
    changed["students"][EVIL]["confusion"] = {"novel": {"classes": [EVIL], "counts": [[3, 1], [0, 8]]}}
    changed["students"][EVIL]["seen"] = {"novel": [EVIL]}
    changed |= {"exports": {EVIL: EVIL}, "protocol": changed["protocol"] | {EVIL: EVIL}, "quarantine": {EVIL: 2}}
    changed["stages"][EVIL] = {"status": EVIL, "seconds": 1}
    ledger = evaluated_run.folder.path.with_name(f"{evaluated_run.folder.path.name}-ledger")
    ledger.mkdir()
    (ledger / "labels.svg").write_text(EVIL)
    text = written(evaluated_run, changed)
    shutil.rmtree(ledger)
    assert "<script" not in text
    page = Page(text)
    assert f"data:image/svg+xml;base64,{b64encode(EVIL.encode()).decode()}" in page.sources
    assert page.sources
    assert all(source.startswith("data:") for source in page.sources)
    assert not re.findall(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", text.partition("All settings")[0])
    table = page.tables["Accuracy by class, novel"]
    evil = [EVIL, "7", "4", "25.0 %", "5 to 70", EVIL, EVIL]
    assert table[1:] == [["b", "9", "1,200", "12.5 %", "11 to 14", "–", "–"], evil]  # the worst first


def test_a_run_that_was_not_evaluated_has_a_page_of_its_stages(evaluated_run: Run, summary: dict[str, Any]) -> None:
    kept = {key: summary[key] for key in ("run", "stages", "exports", "quarantine")}
    page = Page(written(evaluated_run, kept))
    assert set(page.tables) == {"Stages", "Settings and versions"}


def test_curves_take_the_last_of_a_step_done_twice_and_leave_out_what_is_not_finite() -> None:
    scores = {"5way_1shot": {"mean": 0.4, "ci95": 0.1}, "5way_5shot": {"mean": 0.6, "ci95": 0.05}}
    few_shot = {"kind": "evaluated", "stage": "teach", "network": "teacher", "split": "val"}
    events: list[dict[str, Any]] = [
        {"kind": "train", "stage": "teach", "step": step, "loss/teacher/a.b": loss}
        for step, loss in ((1, 4.0), (2, 3.0), (2, 2.0), (3, float("nan")))
    ]
    events += [few_shot | {"step": step, "scores": scores} for step in (1, 2)] + [{"kind": "alive"}]
    accuracy, losses = (ET.fromstring(chart) for chart in curves(events))
    assert accuracy[0].text == "teach: accuracy in %, val, 5-shot"
    assert losses[0].text == "teach: loss of teacher"
    assert sum(each.tag.endswith("circle") for each in losses) == 2
    texts = [each.text for each in losses if each.tag.endswith("text")]
    assert texts[-1] == "a.b"
    assert {"2", "4"} <= set(texts)
    assert "3.5" in texts  # the axis goes from 2 to 4: the 3 that was done again does not count


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_browser_opens_it_without_an_error_and_without_a_sideways_scroll(
    evaluated_run: Run, summary: dict[str, Any], tmp_path: Path
) -> None:
    written(evaluated_run, summary)
    page = evaluated_run.folder.path / REPORT_NAME
    faults, dom = opened(page)
    assert faults == []
    assert "Few-shot accuracy" in dom
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text().replace("</main>", '<img src="https://example.invalid/a.png"></main>'))
    assert "Content Security Policy" in opened(broken)[0][0]
    # a page of 360 px holds the report in a frame, and writes down how wide it is
    frame, narrow = "<iframe id=f width=360 height=800 srcdoc></iframe>", tmp_path / "narrow.html"
    script = "f.onload = () => document.title = f.contentDocument.documentElement.scrollWidth; f.srcdoc = "
    text = json.dumps(page.read_text()).replace("</", "<\\/")
    narrow.write_text(f"<!doctype html><title>0</title>{frame}<script>{script}{text}</script>")
    assert 300 < int(re.findall(r"<title>(\d+)</title>", opened(narrow)[1])[0]) <= 360


def opened(page: Path) -> tuple[list[str], str]:
    """The messages of the browser's console and the page as the browser has it."""
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--virtual-time-budget=3000",
    ]
    words = [str(CHROMIUM), *options, "--dump-dom", page.as_uri()]
    browser = subprocess.run(words, check=True, capture_output=True, text=True, timeout=120)
    return [line for line in browser.stderr.splitlines() if "CONSOLE" in line], browser.stdout
