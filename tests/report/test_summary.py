"""The summary of a run, from what its stages left."""

import json
from pathlib import Path
from typing import Any

import pytest

from dpkd.io.record import checked
from dpkd.report.figures import Evaluation, count_words, percent
from dpkd.report.quarantine import Quarantine
from dpkd.report.summary import figure_or_none, final_words, write_summary
from dpkd.stages.report import curves


def network(mean: float) -> dict[str, Any]:
    return {
        "model": "resnet18",
        "pooling": "mean",
        "parameters": 110_000,
        "images_per_s": 1234.5,
        "scores": {
            split: {"5way_1shot": {"mean": mean, "ci95": 0.004}, "5way_5shot": {"mean": mean + 0.2, "ci95": 0.003}}
            for split in ("val", "novel")
        },
        "probes": {"novel": {"knn": 0.5, "linear": 0.625}},
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    gain = {"novel": {"5way_1shot": {"mean": 0.05, "ci95": 0.002}, "5way_5shot": {"mean": 0.031, "ci95": 0.002}}}
    evaluation = {
        "protocol": {"way": 5, "shots": [1, 5], "queries": 15, "episodes": 2000, "seed": 0},
        "splits": {"val": "val", "test": "novel"},
        "labelled": {"val": 300, "novel": 400},
        "device": "CPU, 1 thread",
        "teachers": {"teacher": network(0.45)},
        "students": {"small": network(0.44) | {"over_baseline": gain}},
        "baselines": {"small": network(0.39)},
    }
    stages = {"pack": {"status": "done", "seconds": 3.25, "given": {}}, "teach": {"status": "running", "seconds": 60.0}}
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    (tmp_path / "stages.json").write_bytes(checked(stages))
    (tmp_path / "export" / "small").mkdir(parents=True)
    (tmp_path / "export" / ".vit.tmp").mkdir()
    return tmp_path


def test_baselines_have_rows_where_no_student_was_trained(run: Path) -> None:
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation |= {"students": {}, "baselines": {"small.x0.5": network(0.38), "small": network(0.39)}}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    words = final_words(write_summary(run))
    assert "small on labels alone, 0.5 x steps" in words
    assert "39.0 ± 0.4 %" in words
    assert Evaluation(write_summary(run)).judged == "5way_5shot"


def test_a_run_of_masks_speaks_of_masks(run: Path) -> None:
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["protocol"] = {"seed": 0}
    of_masks = {"mean_dice": {"mean": 0.6, "ci95": 0.1}, "mean_iou": {"mean": 0.5, "ci95": 0.1}}
    for network in (
        evaluation["students"]["small"],
        evaluation["baselines"]["small"],
        evaluation["teachers"]["teacher"],
    ):
        network["scores"] = dict.fromkeys(("val", "novel"), of_masks)
    evaluation["students"]["small"]["over_baseline"] = {"novel": {"mean_iou": {"mean": -0.1, "ci95": 0.02}}}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    words = final_words(write_summary(run))
    assert words.startswith("Segmentation of 400 images of novel")
    assert next(iter(Evaluation(evaluation).tables())) == "Segmentation"
    assert "small on masks alone" in words
    assert "small: gain over masks alone" in words
    assert "worse than the same network on masks alone (-10.0 ± 2.0 %)" in words
    assert "labels alone" not in words


@pytest.mark.parametrize(
    ("mean_iou", "boundary_f", "told"),
    [
        (
            0.07,
            -0.04,
            "than that of the same network on masks alone (+7.0 ± 2.0 %), but boundary F is lower (-4.0 ± 2.0 %)",
        ),
        (
            -0.07,
            0.04,
            "worse than the same network on masks alone (-7.0 ± 2.0 %), but boundary F is higher (+4.0 ± 2.0 %): use",
        ),
        (0.07, 0.04, None),
        (0.07, -0.01, None),
    ],
)
def test_figures_of_masks_that_disagree_are_both_told(
    run: Path, mean_iou: float, boundary_f: float, told: str | None
) -> None:
    evaluation = json.loads((run / "evaluation.json").read_text())
    gains = {"boundary_f": {"mean": boundary_f, "ci95": 0.02}, "mean_iou": {"mean": mean_iou, "ci95": 0.02}}
    for kind in ("students", "baselines"):
        evaluation[kind]["small"]["scores"] = dict.fromkeys(("val", "novel"), gains)
    evaluation["students"]["small"]["over_baseline"] = {"novel": gains}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    words = final_words(write_summary(run))
    assert "than" not in words if told is None else told in words
    assert [is_better for _, is_better in Evaluation(write_summary(run)).verdicts()] == [told is None]
    assert told is None or told[1:] in Evaluation(write_summary(run)).verdicts()[0][0]


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("5way_5shot", "accuracy in %, val, 5-shot"),
        ("known_classes", "accuracy in %, val, known classes"),
        ("mean_average_precision", "mean average precision in %, val"),
        ("auroc", "AUROC in %, val"),
        ("mean_iou", "mean IoU in %, val"),
    ],
)
def test_a_chart_names_its_figure(key: str, words: str) -> None:
    event = {"kind": "evaluated", "stage": "teach", "network": "teacher", "split": "val", "step": 1}
    (chart,) = curves([event | {"scores": {key: {"mean": 0.4, "ci95": 0.1}}}])
    assert f"<title>teach: {words}</title>" in chart


def test_summary_json_has_the_promised_keys(run: Path) -> None:
    write_summary(run)
    summary = json.loads((run / "summary.json").read_text())
    for table in (summary["teachers"]["teacher"], summary["students"]["small"], summary["baselines"]["small"]):
        assert table["parameters"] == 110_000
        assert table["images_per_s"] == 1234.5
        assert set(table["scores"]) == {"val", "novel"}
        assert set(table["scores"]["novel"]["5way_1shot"]) == {"mean", "ci95"}
    assert summary["stages"] == {
        "pack": {"status": "done", "seconds": 3.25},
        "teach": {"status": "running", "seconds": 60.0},
    }
    assert summary["exports"] == {"small": str(run / "export" / "small")}


def test_the_run_ends_with_the_table_the_exports_and_the_command(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print(final_words(write_summary(run)))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Few-shot accuracy on novel: 5 classes an episode, the same 2,000 episodes for all")
    table = [line.split("  ") for line in lines[2:7]]
    assert [cells[0] for cells in table[1:]] == [
        "student small",
        "small on labels alone",
        "small: gain over labels alone",
        "teacher",
    ]
    assert lines[3].endswith("110 k     1,234  44.0 ± 0.4 %  64.0 ± 0.3 %")
    assert lines[5].endswith("+5.0 ± 0.2 %  +3.1 ± 0.2 %")
    assert f"  {run}/export/small" in lines
    assert lines[-1] == f"curves:  tensorboard --logdir {run}"


def test_the_run_ends_with_the_accuracy_on_known_classes_where_there_is_one(run: Path) -> None:
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert "known classes" not in final_words(write_summary(run))
    evaluation["students"]["small"]["classification"] = {"val": {"overall": 0.9, "worst_class": 0.125}}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    lines = final_words(write_summary(run)).splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("Accuracy on known classes"))
    assert lines[start + 2].split() == ["val", "overall", "val", "worst_class"]
    assert lines[start + 3].split() == ["student", "small", "90.0", "%", "12.5", "%"]
    assert len(lines[start + 2]) == len(lines[start + 3])


def known(folder: Path, *, gain: dict[str, float], ci95: float) -> str:
    """The last lines of a run whose student and baseline know the classes of 12 images, and whose teacher does not."""
    evaluation = json.loads((folder / "evaluation.json").read_text())
    evaluation |= {"protocol": {"seed": 0}, "splits": {"val": "val", "test": None}, "labelled": {"val": 12}}
    for network, mean in (("students", 0.75), ("baselines", 0.5)):
        evaluation[network]["small"]["scores"] = {"val": {"known_classes": {"mean": mean, "ci95": ci95}}}
    evaluation["students"]["small"]["over_baseline"] = {"val": {"known_classes": gain}}
    evaluation["teachers"]["teacher"]["scores"] = {"val": {}}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return final_words(write_summary(folder))


def test_known_classes_have_their_accuracy_and_gain_and_a_word_on_few_images(run: Path) -> None:
    lines = known(run, gain={"mean": 0.25, "ci95": 0.3}, ci95=0.2).splitlines()
    assert lines[0].startswith("Accuracy on 12 labelled images of val, mean ± 95 % interval")
    assert lines[2].split() == ["parameters", "images/s", "known", "classes"]
    assert lines[3].endswith("75.0 ± 20.0 %")
    assert lines[5].endswith("+25.0 ± 30.0 %")
    assert lines[6].endswith("–")
    assert "accuracy on 12 images may be off by 20 points: label more of val to know it better" in lines
    told = (
        "student small: too few images are measured to tell it from the same network on labels alone (+25.0 ± 30.0 %)"
    )
    assert told in lines
    assert "may be off" not in known(run, gain={"mean": 0.25, "ci95": 0.01}, ci95=0.01)
    assert "is worse than the same network" in known(run, gain={"mean": -0.25, "ci95": 0.2}, ci95=0.01)


@pytest.mark.parametrize(
    ("mean", "told"), [(0.031, None), (0.001, "no better than"), (-0.001, "no better than"), (-0.02, "worse than")]
)
def test_a_student_that_is_not_better_than_its_baseline_is_told_so(run: Path, mean: float, told: str | None) -> None:
    evaluation = json.loads((run / "evaluation.json").read_text())
    gains = evaluation["students"]["small"]["over_baseline"]["novel"]
    gains["5way_5shot"] = {"mean": mean, "ci95": 0.002}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    text = final_words(write_summary(run))
    sentence = (
        f"student small is {told} the same network on labels alone ({percent(gains['5way_5shot'], sign='+')}): use"
    )
    assert (sentence in text) == (told is not None)
    assert (sentence in (run / "summary.md").read_text()) == (told is not None)
    assert ("on labels alone (" in text) == (told is not None)


def test_summary_md_holds_table_probes_protocol_and_stages(run: Path) -> None:
    write_summary(run)
    text = (run / "summary.md").read_text()
    assert "| small on labels alone | 110 k | 1,234 | 39.0 ± 0.4 % | 59.0 ± 0.3 % |" in text
    assert "| student small | 50.0 % | 62.5 % |" in text
    assert "- episodes: 2000" in text
    assert "| teach | running | 1 min 00 s |" in text
    assert f"- small: `{run}/export/small`" in text


def test_a_stage_has_the_median_speed_of_its_log_lines(run: Path) -> None:
    lines = [{"kind": "train", "stage": "teach", "speed/images_per_s": rate} for rate in (1000.0, 1300.0, 10.0)]
    for line in lines:
        line |= {"speed/tflops": 0.4, "speed/mfu": 0.41}
    (run / "events.jsonl").write_text("".join(json.dumps({"time": 1.0, **line}) + "\n" for line in lines))
    stages = write_summary(run)["stages"]
    assert stages["teach"]["speed"] == {"images_per_s": 1000.0, "tflops": 0.4, "mfu": 0.41}
    assert "speed" not in stages["pack"]
    text = (run / "summary.md").read_text()
    assert "| teach | running | 1 min 00 s | 1,000 images/s, 0.4 TFLOP/s (41 % of the peak) |" in text
    assert "| pack | done | 3 s | – |" in text


def test_a_figure_ground_network_stands_with_what_it_does_without_its_map(run: Path) -> None:
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["teachers"]["teacher"]["plain_pooling"] = network(0.25)["scores"]
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    lines = final_words(write_summary(run)).splitlines()
    assert lines[6].startswith("teacher ")
    assert lines[6].endswith("25.0 ± 0.4 %  45.0 ± 0.3 %")
    assert lines[7].startswith("  with its prior map  ")
    assert lines[7].endswith("45.0 ± 0.4 %  65.0 ± 0.3 %")


def test_figures_on_classes_that_public_weights_have_seen_are_marked_invalid(run: Path) -> None:
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert "invalid" not in final_words(write_summary(run))
    for network_of in (evaluation["teachers"]["teacher"], evaluation["students"]["small"]):
        network_of["seen"] = {"novel": ["bird", "cat", "dog", "fish"], "val": ["car"]}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    text = final_words(write_summary(run))
    starred = [line.split("  ")[0] for line in text.splitlines() if " *  " in line]
    assert starred == ["student small *", "teacher *"]
    sentence = "weights of student small, teacher or of a teacher have seen 4 classes of novel (bird, cat, dog, …)"
    assert f"* invalid: {sentence}, as teachers.<name>.seen says" in text
    assert sentence in (run / "summary.md").read_text()


def test_a_run_that_was_not_evaluated_has_a_summary_of_its_stages(run: Path) -> None:
    (run / "evaluation.json").unlink()
    summary = write_summary(run)
    assert "teachers" not in summary
    assert summary["stages"]["pack"]["status"] == "done"
    assert "tensorboard" in final_words(summary)
    assert "| pack | done | 3 s |" in (run / "summary.md").read_text()


def test_what_was_quarantined_is_counted_by_stage_and_not_mentioned_where_there_is_nothing(run: Path) -> None:
    assert write_summary(run)["quarantine"] == {}
    assert "quarantine.jsonl" not in (run / "summary.md").read_text()
    quarantine = Quarantine(run / "quarantine.jsonl", limit=1)
    for stage, item in (("pack", "a"), ("prepare", "b"), ("prepare", "c")):
        quarantine.add(stage, item, "it is cut short")
    quarantine.add("prepare", "base-000000.tar", "it is cut short", counted=False)
    summary = write_summary(run)
    assert summary["quarantine"] == {"pack": 1, "prepare": 2}
    words = f"3 samples (1 in pack, 2 in prepare), named with reasons in {run}/quarantine.jsonl"
    assert f"quarantined: {words}" in final_words(summary).splitlines()
    assert words in (run / "summary.md").read_text().splitlines()


def test_a_figure_that_cannot_be_had_is_a_dash(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["students"]["small"]["images_per_s"] = figure_or_none("images/s of small", lambda: 1 / 0)
    assert "images/s of small: none, because of ZeroDivisionError: division by zero" in capsys.readouterr().out
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    write_summary(run)
    assert "| student small | 110 k | – | 44.0 ± 0.4 % |" in (run / "summary.md").read_text()


def test_numbers_are_rounded_for_people() -> None:
    assert percent({"mean": 0.56149, "ci95": 0.0041}) == "56.1 ± 0.4 %"
    assert percent({"mean": -0.002, "ci95": 0.0041}, sign="+") == "-0.2 ± 0.4 %"
    assert [count_words(count) for count in (4_000, 110_000, 9_994_000, 21_600_000)] == [
        "4 k",
        "110 k",
        "9.99 M",
        "22 M",
    ]
