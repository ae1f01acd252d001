"""The ledger: its rows, its statistics and advice, and that it goes on where it was stopped, within its budget."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from scipy.stats import ttest_rel

from dpkd import cli
from dpkd.data.settings import LabelFraction
from dpkd.errors import UserError
from dpkd.objectives import BuiltIn
from dpkd.run.folder import RunFolder
from dpkd.settings import Settings
from dpkd.stages.rows import ALL, LABELS, PLAIN, RANDOM, TRICKS, TRICKS_ON_ALL, prior_uses, rows_of, with_overrides
from dpkd.verbs.ledger import Ledger, seconds_of
from dpkd.verbs.ledger_report import MEAN, Results, advise, interval
from tests.runs import settings_of, tiny, train_events

FEW_LABELS = LabelFraction(fraction=0.2)
HALF = {"kind": "fraction", "fraction": 0.5}
TWO_ROWS = f"{ALL},{LABELS}"


def tree_of(folder: Path, *, source: Path | None = None) -> dict[str, Any]:
    """Tiny settings whose teacher also learns rotation, and has other grounds."""
    tree = tiny(folder / "run", source=source or folder)
    teacher = tree["teachers"]["teacher"]
    teacher["objectives"].append({"kind": "rotation", "weight": 0.5})
    teacher["augment"] = {"background": {"share": 0.25}}
    return tree


def derived(settings: Settings, *, shares: tuple[float, ...] = ()) -> dict[str, Settings]:
    table = rows_of(settings, shares=shares)
    return {name: with_overrides(settings, overrides, origin=name) for name, overrides in table.items()}


def test_each_row_differs_from_the_settings_in_what_its_name_says(tmp_path: Path) -> None:
    settings = settings_of(tree_of(tmp_path))
    uses = ["teacher.pooling", "teacher.background", "teacher.masked_prior", "students.pooling", "students.patches"]
    assert list(prior_uses(settings)) == uses
    rows = derived(settings, shares=(0.1,))
    assert list(rows)[:5] == [ALL, LABELS, TRICKS, PLAIN, RANDOM]
    assert rows[ALL] == settings
    shown = {name: used(row) for name, row in rows.items()}
    everything = used(settings)
    for name in uses:
        assert shown[f"without {name}"] == everything - {name}
        assert shown[f"only {name}"] == {name}
    assert shown[PLAIN] == shown[LABELS] == shown[TRICKS] == set()
    assert shown[RANDOM] == everything
    teacher, student = rows[RANDOM].teachers["teacher"], rows[RANDOM].distill.students["vit"]
    assert teacher.augment.background is not None
    assert teacher.augment.background.control == "shuffle"
    poolings = [network.model.pooling for network in rows[RANDOM].networks.values()]
    assert {getattr(pooling, "control", None) for pooling in poolings} == {"shuffle", None}
    assert [each.control for each in teacher.objectives] == ["none", "shuffle", "none"]
    assert [each.control for each in student.objectives] == ["none", "none", "none", "shuffle"]
    patches = rows[PLAIN].distill.students["vit"].objectives[3].model_dump()
    assert (patches["kind"], patches["saliency"], patches["edge"]) == ("patches", 0, 0)
    kinds = {LABELS: ["supervised"], TRICKS: ["supervised", "rotation"]}
    for name, expected in kinds.items():
        assert rows[name].teachers == {}
        assert rows[name].distill.training.labelled_share == 1
        for row_student in rows[name].distill.students.values():
            assert [each.kind for each in row_student.objectives] == expected
    assert TRICKS_ON_ALL not in rows  # every label is visible
    few = derived(settings.model_copy(update={"data": settings.data.model_copy(update={"labels": FEW_LABELS})}))
    assert few[TRICKS].distill.training.labelled_share == 1
    assert few[TRICKS_ON_ALL].distill.training == settings.distill.training
    assert few[TRICKS_ON_ALL].distill.students == few[TRICKS].distill.students
    assert rows["all at 10 % of labels"].data.labels.model_dump() == {"kind": "fraction", "fraction": 0.1}
    assert rows["labels alone at 10 % of labels"].teachers == {}


def used(settings: Settings) -> set[str]:
    """The uses of maps that are on, by reading the settings as training does."""
    found = {f"{owner}.pooling" for owner, model in models(settings) if model.pooling.kind == "figure_ground"}
    for name, teacher in settings.teachers.items():
        found |= {f"{name}.background"} if teacher.augment.background else set()
        found |= {f"{name}.{each.kind}" for each in teacher.objectives if each.needs().maps}
    for student in settings.distill.students.values():
        found |= {f"students.{each.kind}" for each in student.objectives if each.needs().maps}
    return found


def models(settings: Settings) -> list[tuple[str, Any]]:
    students = [("students", student.model) for student in settings.distill.students.values()]
    return [*((name, teacher.model) for name, teacher in settings.teachers.items()), *students]


@pytest.mark.parametrize("kind", get_args(get_args(BuiltIn)[0]))
def test_an_objective_without_maps_needs_none_and_is_else_the_same(kind: Any) -> None:
    required = {"region_bounds": {"of": "saliency", "bounds": [{"statistic": "area", "at_most": 0.5}]}}
    name = kind.model_fields["kind"].default
    required["locality"] = {"layers": {0: 1}}
    objective = kind.model_validate(required.get(name, {}) | {"weight": 0.3, "name": "mine"})
    plain = objective.without_maps()
    if not objective.needs().maps or name == "segmentation":
        assert plain is objective
    elif plain is not None:
        assert plain.needs().maps == ()
        assert plain.needs().teacher == objective.needs().teacher
        assert (plain.weight, plain.name, plain.control) == (0.3, "mine", "none")
        shuffled = objective.model_copy(update={"control": "shuffle"}).without_maps()
        assert shuffled == plain


def test_gains_are_paired_by_seed_and_their_interval_is_that_of_the_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.normal(0.6, 0.02, (2, 5))
    runs = [(ALL, seed, {"conv": {"val 5-shot": value}}) for seed, value in enumerate(one)]
    runs += [(LABELS, seed, {"conv": {"val 5-shot": value}}) for seed, value in enumerate(other[:4])]
    gain = Results(runs, {ALL: ALL, LABELS: LABELS}).estimate(ALL, LABELS, "conv")
    reference = ttest_rel(one[:4], other[:4]).confidence_interval(0.95)
    assert gain is not None
    assert gain.num_seeds == 4
    assert (gain.mean - (gain.half or 0), gain.mean + (gain.half or 0)) == pytest.approx(tuple(reference), abs=1e-12)
    assert gain.sign == int(reference.low > 0) - int(reference.high < 0)


def test_with_few_pairs_the_mean_gives_the_direction() -> None:
    one, two = interval([0.02]), interval([0.05, -0.01])
    assert one is not None
    assert two is not None
    assert (one.half, one.sign, two.sign) == (None, 1, 1)
    three = interval([0.05, -0.01, 0.02])
    assert three is not None
    assert three.sign == 0
    assert interval([]) is None


USES = ["teacher.pooling", "students.patches"]
STUDENTS = ("conv", "vit")


@pytest.mark.parametrize(
    ("accuracy", "row", "removed"),
    [
        ({}, ALL, []),
        ({LABELS: 0.72}, TRICKS, []),
        ({LABELS: 0.72, TRICKS: 0.65}, LABELS, []),
        ({TRICKS: 0.72}, TRICKS, []),
        ({TRICKS_ON_ALL: 0.72}, TRICKS_ON_ALL, []),
        ({"without students.patches": 0.72}, ALL, ["students.patches"]),
        ({PLAIN: 0.72, "without teacher.pooling": 0.71, "without students.patches": 0.705}, PLAIN, []),
    ],
)
def test_the_advice_follows_the_gains(accuracy: Mapping[str, float], row: str, removed: list[str]) -> None:
    usual = {ALL: 0.7, LABELS: 0.6, TRICKS: 0.62, PLAIN: 0.66, RANDOM: 0.65}
    usual |= {f"without {name}": 0.68 for name in USES} | {f"only {name}": 0.65 for name in USES}
    table = {**usual, **({TRICKS: 0.73} if accuracy == {LABELS: 0.72} else {}), **accuracy}
    # the difference of two rows varies a little from seed to seed; a student more does not change the advice
    runs = [
        (name, seed, {student: {"val 5-shot": mean + 1e-4 * (len(name) * (seed + 1) % 7)} for student in STUDENTS})
        for name, mean in table.items()
        for seed in range(3)
    ]
    results = Results(runs, {name: name for name in table})
    assert results.students == [*STUDENTS, MEAN]
    assert advise(results, USES)[:2] == (row, removed)
    compared = [comparison[:2] for comparison in results.comparisons(USES)]
    assert {(ALL, LABELS), ("only teacher.pooling", PLAIN)} <= set(compared)
    for pair in compared:
        gain = results.estimate(*pair, MEAN)
        assert gain is not None
        assert gain.mean == pytest.approx(table[pair[0]] - table[pair[1]], abs=1e-3)


def test_students_that_gain_and_lose_are_judged_apart_and_their_mean_is_that_of_both() -> None:
    runs = [
        (ALL, 0, {"conv": {"val": 0.7}, "vit": {"val": 0.5}}),
        (LABELS, 0, {"conv": {"val": 0.6}, "vit": {"val": 0.7}}),
    ]
    results = Results(runs, {ALL: ALL, LABELS: LABELS, "without a": ALL})
    gains = [results.estimate(ALL, LABELS, student) for student in results.students]
    assert [gain.mean for gain in gains if gain] == pytest.approx([0.1, -0.2, -0.05])
    assert advise(results, ["a"])[0] == ALL  # one student gains
    assert [compared[:2] for compared in results.comparisons(["a"])] == [(ALL, LABELS)]  # equal rows are not compared


def test_the_report_has_the_accuracy_by_share_of_labels_and_the_settings_to_copy(tmp_path: Path) -> None:
    settings = settings_of(tree_of(tmp_path) | {"data": tiny(tmp_path, source=tmp_path)["data"] | {"labels": HALF}})
    table = rows_of(settings)
    accuracy = {ALL: 0.5, LABELS: 0.6, "all at 10 % of labels": 0.3, "labels alone at 10 % of labels": 0.4}
    runs = [(row, 0, 61.0, {"conv": {"val 1-shot": 0.2, "val 5-shot": mean}}) for row, mean in accuracy.items()]
    ledger = Ledger(settings, tmp_path, pairs=1, shares="0.5,0.1")
    ledger.write(runs, left=["all, seed 1"], failed=["random maps, seed 0: full"])
    text, record = (tmp_path / "ledger.md").read_text(), json.loads((tmp_path / "ledger.json").read_text())
    assert "distilling hurts here: use labels alone" in text
    assert record["advice"]["row"] == LABELS
    assert all(f"\n{shlex.quote(each)}" in text for each in table[LABELS])
    shares = "all at 10 % of labels − labels alone at 10 % of labels"
    assert f"| {shares}: distilling at 10 % of labels | conv | +0.0 | -10.0 | 1 |" in text
    assert "| all, 1 min 01 s a run | conv | 20.0 | 50.0 | 1 |" in text
    assert all(
        line in text
        for line in ("- all at 50 % of labels: the same as all", "- failed: random maps, seed 0: full", "- all, seed 1")
    )
    curves = (tmp_path / "labels.svg").read_text()
    assert curves.count("<circle") == 4  # the rows at 10 %, and the rows as the settings are, at 50 %


@pytest.mark.parametrize(
    ("changes", "options", "named"),
    [
        ({}, {"rows": "all,without teacher.poling"}, "did you mean 'without teacher.pooling'?"),
        ({}, {"pairs": 0}, "--pairs 0"),
        ({}, {"shares": "5"}, "--shares '5'"),
        ({}, {"shares": "0.5,"}, "--shares '0.5,'"),
        ({}, {"shares": "a"}, "--shares 'a'"),
        ({"evaluate": None}, {}, "set evaluate"),
    ],
)
def test_what_allows_no_comparison_is_refused(tmp_path: Path, changes: Any, options: Any, named: str) -> None:
    with pytest.raises(UserError, match=named.replace("?", r"\?")):
        Ledger(settings_of(tree_of(tmp_path) | changes), tmp_path / "out", **{"pairs": 1, **options})


def test_settings_without_teachers_are_refused(tmp_path: Path) -> None:
    settings = settings_of(tree_of(tmp_path))
    alone = with_overrides(settings, rows_of(settings)[LABELS], origin="test")
    with pytest.raises(UserError, match="no teachers"):
        Ledger(alone, tmp_path / "out", pairs=1)


def test_rows_with_equal_settings_run_once(tmp_path: Path) -> None:
    tree = tree_of(tmp_path)
    tree["teachers"]["teacher"] |= {"model": "resnet18", "objectives": [{"kind": "supervised"}]}
    for student in tree["distill"]["students"].values():
        student |= {"model": "resnet18", "objectives": [{"kind": "supervised"}, {"kind": "logits"}]}
    ledger = Ledger(settings_of(tree), tmp_path / "out", pairs=2)
    assert [(run.row, run.seed) for run in ledger.trainings] == [
        (row, seed) for seed in (0, 1) for row in (ALL, LABELS, PLAIN, RANDOM)
    ]
    assert ledger.same["only teacher.background"] == ALL
    assert ledger.same["without teacher.background"] == PLAIN
    assert TRICKS not in ledger.same


@pytest.mark.parametrize(("text", "seconds"), [("90m", 5400), ("2h", 7200), ("1h30min", 5400), ("0.5d", 43200)])
def test_a_budget_is_a_duration(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "2", "2 h", "h2", "2h and more", "-1h"])
def test_a_budget_that_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="no duration"):
        seconds_of(text)


def test_a_ledger_reports_its_runs_goes_on_and_holds_its_budget(
    whole: RunFolder, sample_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = tmp_path / "settings.yaml", tmp_path / "out"
    config.write_text(yaml.safe_dump(tiny(tmp_path / "run", source=sample_folder)))
    command = ["ledger", "--config", str(config), "--out", str(out), "--rows", TWO_ROWS]
    assert cli.main([*command, "--pairs", "1", "--jobs", "2"]) == 0
    record = json.loads((out / "ledger.json").read_text())
    assert {(run["row"], run["seed"]) for run in record["runs"]} == {(ALL, 0), (LABELS, 0)}
    figures = {row: json.loads((out / row / "seed-0/summary.json").read_text()) for row in ("all", "labels-alone")}
    conv, alone = (summary["students"]["conv"] for summary in figures.values())
    difference = conv["plain_pooling"]["novel"]["5way_5shot"]["mean"] - alone["scores"]["novel"]["5way_5shot"]["mean"]
    (gain,) = [gain for gain in record["gains"] if gain["student"] == "conv"]
    assert gain["by_place"]["novel 5-shot"] == [pytest.approx(difference), None, 1]
    # the student of the row is the baseline of a whole run, to the last bit
    baseline = load_file(whole.baselines / "conv/model.safetensors")
    student = load_file(out / "labels-alone/seed-0/students/conv/model.safetensors")
    assert all(torch.equal(student[name], tensor) for name, tensor in baseline.items())
    assert f"| {100 * difference:+.1f} | 1 |" in (out / "ledger.md").read_text()
    # the chart has the mean over students
    (both,) = [gain["by_place"]["novel 5-shot"][0] for gain in record["gains"] if gain["student"] == MEAN]
    drawn = ET.parse(out / "gains.svg").getroot().iter("{http://www.w3.org/2000/svg}text")
    assert f"{100 * both:+.1f}" in [text.text for text in drawn]
    capsys.readouterr()
    assert cli.main([*command, "--pairs", "2", "--budget", "1s"]) == 0  # no run of a second pair takes so little
    lines = capsys.readouterr().out
    assert "4 runs" in lines
    assert f"2 runs are left; go on with: dpkd ledger --config {config}" in lines
    assert not (out / "all/seed-1").exists()
    assert "- all, seed 1" in (out / "ledger.md").read_text()
    assert cli.main([*command, "--pairs", "1", "teachers.teacher.optimizer.learning_rate=0.5"]) == 2
    assert "teachers.teacher.optimizer.learning_rate: 0.001 on disk, 0.5 now" in capsys.readouterr().err


def test_a_fault_of_the_first_run_ends_the_ledger_with_its_message(sample_folder: Path, tmp_path: Path) -> None:
    tree = tiny(tmp_path / "run", source=sample_folder)
    tree["evaluate"]["episodes"] |= {"way": 9}
    with pytest.raises(UserError, match=r"all, seed 0: error: evaluate.episodes.way=9 is too large"):
        Ledger(settings_of(tree), tmp_path / "out", pairs=1).run()


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_ledger_whose_driver_ends_goes_on_and_ends_with_the_same_figures(
    sample_folder: Path, tmp_path: Path, number: signal.Signals
) -> None:
    tree = tiny(tmp_path / "run", source=sample_folder)
    tree["teachers"]["teacher"]["training"] |= {"steps": 60}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(tree))

    def start(name: str) -> "subprocess.Popen[bytes]":
        options = ["--config", str(tmp_path / "settings.yaml"), "--out", str(tmp_path / name), "--rows", TWO_ROWS]
        words = [sys.executable, "-m", "dpkd.cli", "ledger", "--pairs", "1", *options]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        return subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL)

    assert start("unbroken").wait() == 0
    driver, folder = start("broken"), RunFolder(tmp_path / "broken/all/seed-0")
    while not any(line["step"] >= 10 for line in train_events(folder)):
        assert driver.poll() is None
        time.sleep(0.05)
    driver.send_signal(number)
    assert driver.wait() == (75 if number == signal.SIGTERM else -9)
    assert start("broken").wait() == 0
    assert "continues after step" in (tmp_path / "broken/all/seed-0.log").read_text()
    records = [json.loads((tmp_path / name / "ledger.json").read_text()) for name in ("unbroken", "broken")]
    assert records[0]["gains"] == records[1]["gains"]
