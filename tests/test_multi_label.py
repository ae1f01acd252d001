"""Several labels an image: tables, splits, visible labels, losses and scores, and a run from table to predictions."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

import dpkd
from dpkd import cli
from dpkd.backends.local_pool import LocalPool
from dpkd.data import sources
from dpkd.data.images import encode_png
from dpkd.data.labels import visible_labels
from dpkd.data.settings import FractionSplits, LabelFraction, LabelsPerClass, ShardSource, TableSource
from dpkd.data.shards import Dataset
from dpkd.data.sources.records import Blob, Record
from dpkd.data.splits import assign
from dpkd.defaults import chosen_settings
from dpkd.engine.world import World
from dpkd.errors import UserError
from dpkd.evaluation.multi_label import label_values, mean_score, measure_labels
from dpkd.objectives.multi_label import MultiLabel, distil_labels, multi_label
from dpkd.settings import load_settings
from dpkd.stages.baselines import baselines
from dpkd.stages.classify import compare, measure_several
from dpkd.stages.run import Run
from tests.data.packing import pack_at
from tests.exports import make_shots
from tests.runs import CONV, Command, settings_of, tiny

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}
SHARES = {"red": 0.5, "green": 0.3, "blue": 0.15}


def draw_table(folder: Path, *, num: int = 120) -> Path:
    """Images with squares of some colours, each a label, in a CSV; some cells are empty, and some uncertain."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(num):
        image_HWC = rng.integers(90, 150, (32, 32, 3)).astype(np.uint8)
        row: dict[str, Any] = {"file": f"{number:03d}.png", "patient": number // 2}
        for place, (name, colour) in enumerate(COLOURS.items()):
            has = rng.random() < SHARES[name]
            if has:
                top, left = rng.integers(0, 20), place * 11
                image_HWC[top : top + 10, left : left + 10] = colour
            row[name] = "" if rng.random() < 0.1 else "-1.0" if rng.random() < 0.05 else f"{float(has)}"
        if number % 10 == 9:
            row |= dict.fromkeys(COLOURS, "")
        rows.append(row)
        (folder / row["file"]).write_bytes(encode_png(image_HWC))
    with (folder / "images.csv").open("w", newline="") as file:
        lines = csv.DictWriter(file, rows[0], delimiter=";")
        lines.writeheader()
        lines.writerows(rows)
    return folder / "images.csv"


def table(path: Path, **settings: Any) -> TableSource:
    return TableSource(path=str(path), path_column="file", **settings)


def found(source: TableSource) -> dict[str, Any]:
    contents = sources.find(source, pool=LocalPool(1))
    return {record.name: record.labels for record in contents.records} | {"bad": contents.bad}


def test_labels_of_a_table(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(
        "file,a,b,names\n1.png,1,0,x|y\n2.png,1.0,,x\n3.png,-1,True,\n4.png,,,z | x\n5.png,2,0,nan|x\n6.png,-1,-1,y\n"
        "7.png,1,1,-1|x\n"
    )
    columns = found(table(path, label_columns=("a", "b")))
    assert columns["1.png"] == {"a": 1, "b": 0}
    assert columns["2.png"] == {"a": 1, "b": -1}
    assert columns["3.png"] == {"a": -1, "b": 1}
    assert columns["4.png"] is None
    assert columns["6.png"] is None
    assert [item for item, _ in columns["bad"]] == [f"{path} row 5 (5.png)"]
    assert found(table(path, label_columns=("a", "b"), uncertain="positive"))["6.png"] == {"a": 1, "b": 1}
    assert found(table(path, label_columns=("a", "b"), uncertain="negative"))["3.png"] == {"a": 0, "b": 1}
    names = found(table(path, labels_column="names"))
    assert [names[f"{n}.png"] for n in (1, 2, 3, 4, 6)] == [
        {"x": 1, "y": 1},
        {"x": 1},
        None,
        {"z": 1, "x": 1},
        {"y": 1},
    ]
    assert [item for item, _ in names["bad"]] == [f"{path} row {n} ({n}.png)" for n in (5, 7)]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"label_columns": ("a",), "label_column": "b"}, "label_column and label_columns"),
        ({"label_columns": ("a", "a")}, "'a' twice"),
    ],
)
def test_contradicting_columns_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        TableSource(path="t.csv", **settings)


def test_a_missing_label_column_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("file,edema\n1.png,1\n")
    with pytest.raises(UserError, match=r"label_columns\[1\]='oedema' .*edema"):
        found(table(tmp_path / "t.csv", label_columns=("edema", "oedema")))


def test_splits_share_each_label_and_cut_no_group() -> None:
    rng = np.random.default_rng(1)
    records = []
    for patient in range(300):
        ill = {name: int(rng.random() < share) for name, share in {"common": 0.5, "some": 0.1, "rare": 0.03}.items()}
        images = range(rng.integers(1, 4))
        records += [Record(f"{patient}-{image}", Blob("x"), labels=ill, group=str(patient)) for image in images]
    fractions = FractionSplits(fractions={"train": 0.6, "val": 0.2, "test": 0.2})
    splits = assign(records, fractions, seed=0, train="train", listed={}).splits
    of_patient: dict[str | None, set[str | None]] = {}
    for record, split in zip(records, splits, strict=True):
        of_patient.setdefault(record.group, set()).add(split)
    assert all(len(each) == 1 for each in of_patient.values())
    for name in ("common", "some", "rare"):
        has = np.array([record.labels is not None and record.labels[name] for record in records], bool)
        for split, share in fractions.fractions.items():
            part = np.mean(np.array(splits)[has] == split)
            assert abs(part - share) <= max(0.02, 2 / has.sum()), (name, split, part)


def test_visible_labels_grow_and_cover_each_label() -> None:
    rng = np.random.default_rng(2)
    label_NK = (rng.random((200, 3)) < (0.5, 0.2, 0.05)).astype(np.int8)
    label_NK[rng.random((200, 3)) < 0.1] = -1
    keys = [f"k{n}" for n in range(200)]
    fewer = visible_labels(label_NK, LabelsPerClass(count=3), keys=keys, seed=0)
    more = visible_labels(label_NK, LabelsPerClass(count=6), keys=keys, seed=0)
    half = visible_labels(label_NK, LabelFraction(fraction=0.5), keys=keys, seed=0, unreadable=[0, 1])
    assert ((fewer == 1).sum(0) >= 3).all()
    shown = (fewer >= 0).any(1)
    assert (more[shown] == label_NK[shown]).all()
    assert (fewer[shown] == label_NK[shown]).all()
    assert (half[:2] == -1).all()
    assert shown.sum() <= 12


def test_the_loss_is_that_of_the_paper_and_of_torch() -> None:
    torch.manual_seed(0)
    logit_BK = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    label_BK = torch.randint(-1, 2, (8, 3))
    known_share_K = (label_BK >= 0).double().mean(0)
    known = label_BK >= 0
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logit_BK[known], label_BK[known].double())
    torch.testing.assert_close(multi_label(logit_BK, label_BK, known_share_K=known_share_K), expected)
    by_hand = torch.tensor(0.0, dtype=torch.float64)
    for logit, label in zip(logit_BK.flatten(), label_BK.flatten(), strict=True):
        p = 1 / (1 + torch.exp(-logit))
        if label == 1:
            by_hand = by_hand - (1 - p) ** 1 * torch.log(p)
        elif label == 0:
            q = torch.clamp(p - 0.05, min=0)
            by_hand = by_hand - q**4 * torch.log(1 - q)
    focused = {"gamma_positive": 1.0, "gamma_negative": 4.0, "clip": 0.05}
    loss = multi_label(logit_BK, label_BK, known_share_K=known_share_K, **focused)
    torch.testing.assert_close(loss, by_hand / known.sum())
    parts = [
        multi_label(logit_BK[rows], label_BK[rows], known_share_K=known_share_K) for rows in (slice(4), slice(4, 8))
    ]
    torch.testing.assert_close((parts[0] + parts[1]) / 2, expected)
    extreme = multi_label(torch.tensor([[80.0, -80.0]]), torch.tensor([[0, 1]]), known_share_K=torch.ones(2), **focused)
    assert torch.isfinite(extreme)


def test_distillation_is_the_mean_of_binary_kl() -> None:
    student_BK, teacher_BK = torch.randn(5, 4), torch.randn(5, 4)
    binary = [torch.stack([torch.zeros(5, 4), logit / 2.0], 2) for logit in (student_BK, teacher_BK)]
    kl = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=binary[1]), torch.distributions.Categorical(logits=binary[0])
    )
    torch.testing.assert_close(distil_labels(student_BK, teacher_BK, temperature=2.0), 4 * kl.mean())


@pytest.mark.parametrize("decimals", [1, 8])
def test_scores_are_those_of_scikit_learn(decimals: int) -> None:
    rng = np.random.default_rng(3)
    label_NK = (rng.random((300, 4)) < (0.5, 0.1, 0.02, 1.0)).astype(np.int8)
    label_NK[rng.random((300, 4)) < 0.2] = -1
    score_NK = (label_NK + rng.normal(size=(300, 4))).round(decimals)  # with many equal scores, and with few
    measured = measure_labels(score_NK, label_NK, seed=0)
    for k in range(3):
        known = label_NK[:, k] >= 0
        truth, score = label_NK[known, k], score_NK[known, k]
        assert measured["precision"][0, k] == pytest.approx(average_precision_score(truth, score))
        assert measured["auroc"][0, k] == pytest.approx(roc_auc_score(truth, score))
    assert np.isnan(measured["precision"][:, 3]).all()  # no image lacks it: nothing to tell apart
    scores = {
        key: mean_score(value) for key, value in label_values(measured, train_count_K=np.array([90, 19, 3, 90])).items()
    }
    assert scores["mean_average_precision"]["mean"] == pytest.approx(measured["precision"][0, :3].mean())
    assert scores["average_precision_of_rare_labels"]["mean"] == pytest.approx(measured["precision"][0, 1:3].mean())


def test_the_interval_covers_the_score_of_new_images() -> None:
    covered, rng = 0, np.random.default_rng(4)

    def images(num: int) -> tuple[np.ndarray, np.ndarray]:
        label_NK = (rng.random((num, 1)) < 0.2).astype(np.int8)
        return label_NK + rng.normal(size=(num, 1)), label_NK

    truth = 0.7602  # Φ(1 / √2)
    for draw in range(100):
        score = mean_score(measure_labels(*images(150), seed=draw)["auroc"])
        covered += abs(score["mean"] - truth) <= score["ci95"]
    assert 88 <= covered <= 100


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """A whole run on drawn images with several labels each."""
    folder = tmp_path_factory.mktemp("several")
    tree = tiny(folder / "run", source=None)
    source = table(draw_table(folder / "images"), label_columns=tuple(COLOURS), group_column="patient")
    tree["data"] |= {
        "source": source.model_dump(mode="json"),
        "splits": {"kind": "fraction", "fractions": {"train": 0.5, "val": 0.25, "test": 0.25}},
        "train": "train",
        "val": "val",
        "test": "test",
        "labels": {"kind": "fraction", "fraction": 0.6},
    }
    length = {"steps": 40, "batch_size": 16, "labelled_share": 0.75, "evaluate_every": 20, "micro_batch_size": None}
    tree["teachers"]["teacher"] |= {"objectives": [{"kind": "multi_label"}, {"kind": "rotation", "weight": 0.1}]}
    tree["teachers"]["teacher"]["training"] |= length
    losses = [
        {"kind": "multi_label", "balance": "logit_adjusted"},
        {"kind": "multi_label_logits"},
        {"kind": "features"},
    ]
    tree["distill"]["students"] = {"conv": {"model": CONV, "objectives": losses, "engine": {"kind": "torch"}}}
    tree["distill"]["training"] |= length
    tree["export"] = {"onnx": True}
    command = Command(tree)
    assert command.wait() == 0, command.output
    return command


def test_a_whole_run_measures_exports_and_predicts(run: Command, tmp_path: Path) -> None:
    folder = run.folder.path
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert evaluation["protocol"]["labels"] == 3
    student = evaluation["students"]["conv"]
    for split in ("val", "test"):
        assert list(student["scores"][split])[-1] == "mean_average_precision"
        assert set(student["labels"][split]) == set(COLOURS)
        assert "mean_average_precision" in student["over_baseline"][split]
    assert "mean average precision" in run.output
    assert "Average precision by label, test" in (folder / "report.html").read_text()

    export, photos = folder / "export" / "conv", folder.parent / "images"
    rows = dpkd.predict(export, photos, out=tmp_path / "p.csv").to_pylist()
    dataset = Dataset.open(str(folder / "shards"))
    assert all(split.multi_label for split in dataset.manifest.splits.values())
    row_of = {Path(row["file"]).stem: row for row in rows}
    test = dataset.split("test")
    score_NK = np.array([[row_of[key][f"p_{name}"] for name in dataset.manifest.classes] for key in test.keys])
    measured = measure_labels(score_NK, test.label_NK, seed=0)
    exported = student.get("plain_pooling", student["scores"])["test"]["mean_average_precision"]
    assert mean_score(measured["precision"])["mean"] == pytest.approx(exported["mean"], abs=0.02)
    for row in rows:
        assert row["labels"] == "|".join(name for name in dataset.manifest.classes if row[f"p_{name}"] >= 0.5)
    with pytest.raises(UserError, match="--top 2"):
        dpkd.predict(export, photos, top=2)


def test_labels_are_shown_on_the_screen(run: Command, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    folder = run.folder.path
    photo = folder.parent / "images" / "000.png"
    assert cli.main(["predict", str(folder / "export" / "conv"), str(photo)]) == 0
    shown = list(csv.DictReader(io.StringIO(capfdbinary.readouterr().out.decode())))
    assert [list(row) for row in shown] == [["file", "labels", "error"]]


def test_a_multi_label_student_is_adapted_to_classes_that_exclude_one_another(run: Command, tmp_path: Path) -> None:
    shots = make_shots(tmp_path / "shots", {"red": 3, "blue": 3})
    dpkd.adapt(run.folder.path / "export" / "conv", shots, out=tmp_path / "adapted", method="prototypes")
    row = dpkd.predict(tmp_path / "adapted", shots).to_pylist()[0]
    assert row["p_red"] + row["p_blue"] == pytest.approx(1, abs=1e-5)
    assert row["class"] in ("red", "blue")


def test_a_split_of_which_no_label_can_be_told_apart_has_no_figure(run: Command) -> None:
    settings = load_settings(run.folder.path / "settings.yaml", [])
    opened = Run.open(settings, World(rank=0, size=1, local_rank=0, device=torch.device("cpu")))
    split, rng = opened.dataset.split("test"), np.random.default_rng(0)
    split.label_NK = np.ones_like(split.label_NK)  # every image has every label
    logits = rng.normal(size=(len(opened.readable("test")), 3)).astype(np.float32)
    embedded = {"students.conv": {"logits": logits}, "baselines.conv": {"logits": logits}}
    chosen: dict[str, str] = {}
    values, _ = measure_several(opened, split, embedded)
    figures = compare(opened, ["students.conv", "baselines.conv"], values, chosen=chosen)
    assert figures["scores"] == {"students.conv": {}, "baselines.conv": {}}
    assert figures["over_baseline"] == {}
    assert chosen == {}


def test_settings_are_chosen_for_several_labels(tmp_path: Path) -> None:
    path = draw_table(tmp_path / "images", num=200)
    columns = f"data.source.label_columns=[{', '.join(COLOURS)}]"
    settings, text = chosen_settings(str(path), [columns])
    kinds = {key: objective.kind for key, objective in settings.objectives.items()}
    assert kinds["teachers.teacher.objectives.0"] == "multi_label"
    assert {"multi_label", "multi_label_logits"} <= set(kinds.values())
    assert not {"supervised", "logits", "mixup"} & set(kinds.values())
    assert settings.data.val == "val"
    assert settings.evaluate is not None
    assert settings.evaluate.episodes is None
    assert "several labels" in text


def test_packed_labels_are_the_same_when_they_are_packed_again(run: Command, tmp_path: Path) -> None:
    shards = run.folder.path / "shards"
    again = pack_at(ShardSource(path=str(shards)), tmp_path / "again")
    for name in ("train", "val", "test"):
        first, second = Dataset.open(str(shards)).split(name), again.split(name)
        row_of = dict(zip(second.keys, second.label_NK.tolist(), strict=True))
        assert {key: row_of[key] for key in first.keys} == dict(zip(first.keys, first.label_NK.tolist(), strict=True))


def test_a_baseline_learns_labels_as_its_images_have_them(tmp_path: Path) -> None:
    tree = tiny(tmp_path / "run", source=tmp_path)
    tree["teachers"]["teacher"]["objectives"] = [{"kind": "multi_label", "balance": "logit_adjusted"}]
    tree["distill"]["students"] = {
        "conv": {"model": CONV, "objectives": [{"kind": "features"}], "baseline": [1, "plain"]},
        "other": {
            "model": CONV,
            "objectives": [{"kind": "multi_label", "gamma_negative": 4}],
            "baseline": [1, "plain"],
        },
    }
    found = {name: list(baseline.settings.objectives) for name, baseline in baselines(settings_of(tree)).items()}
    assert found == {
        "conv": [MultiLabel()],
        "conv.plain": [MultiLabel(balance="none")],
        "other": [MultiLabel(gamma_negative=4.0)],
        "other.plain": [MultiLabel(balance="none")],
    }


def test_a_baseline_that_would_learn_nothing_is_refused(tmp_path: Path) -> None:
    tree = tiny(tmp_path / "run", source=None)
    source = table(draw_table(tmp_path / "images", num=60), label_columns=tuple(COLOURS))
    tree["data"] |= {"source": source.model_dump(mode="json"), "train": "train", "val": None, "test": None}
    tree["teachers"]["teacher"]["objectives"] = [{"kind": "rotation"}]
    tree["distill"]["students"] = {"conv": {"model": CONV, "objectives": [{"kind": "features"}]}}
    command = Command(tree)
    assert command.wait() == 2
    assert "the baseline conv of kind 'supervised' learns one class an image" in command.output
    assert not (tmp_path / "run" / "shards" / "dataset.json").exists()


def test_masks_beside_several_labels_are_refused_before_images_are_decoded(tmp_path: Path) -> None:
    tree = tiny(tmp_path / "run", source=None)
    source = table(draw_table(tmp_path / "images", num=60), label_columns=tuple(COLOURS))
    tree["data"] |= {"source": source.model_dump(mode="json"), "train": "train", "val": None, "test": None}
    tree["data"]["masks"] = {"kind": "figure_ground"}
    tree["teachers"]["teacher"]["objectives"] = [{"kind": "multi_label"}]
    tree["distill"]["students"] = {"conv": {"model": CONV, "objectives": [{"kind": "multi_label"}]}}
    command = Command(tree)
    assert command.wait() == 2
    assert "their masks would not be measured" in command.output
    assert not (tmp_path / "run" / "shards" / "dataset.json").exists()


@pytest.mark.parametrize(
    ("objectives", "named"),
    [
        ([{"kind": "supervised"}], "'supervised' learns one class"),
        ([{"kind": "multi_label"}, {"kind": "logits"}], "'logits' learns one class"),
    ],
)
def test_objectives_of_one_class_are_refused_before_images_are_decoded(objectives, named, tmp_path: Path) -> None:
    tree = tiny(tmp_path / "run", source=None)
    source = table(draw_table(tmp_path / "images", num=60), label_columns=tuple(COLOURS))
    tree["data"] |= {"source": source.model_dump(mode="json"), "train": "train", "val": None, "test": None}
    tree["teachers"]["teacher"]["objectives"] = [{"kind": "multi_label"}]
    tree["distill"]["students"] = {"conv": {"model": CONV, "objectives": objectives}}
    command = Command(tree)
    assert command.wait() != 0
    assert named in command.output
    assert not (tmp_path / "run" / "shards" / "dataset.json").exists()
