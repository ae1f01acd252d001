"""New classes from a few images: the written folder by timm alone, its rows, its figure, and what is refused."""

import json
import shutil
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import safetensors.numpy
import timm
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform

import dpkd
from dpkd import cli
from dpkd.errors import UserError
from dpkd.evaluation.adaptation import MAX_FOLDS, Measured, logistic, measure, out_of_fold, prototypes
from tests.exports import make_shots, write_export


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export(tmp_path_factory.mktemp("exports") / "conv")


@pytest.fixture(scope="module")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shots(tmp_path_factory.mktemp("shots") / "colours", {"red": 4, "green": 3, "blue": 3})


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpkd.evaluation.exported.STEPS", 4)


@pytest.fixture(scope="module")
def adapted(export: Path, shots: Path) -> Path:
    """Three classes by prototypes, beside the export."""
    return dpkd.adapt(export, shots, method="prototypes").folder


def by_timm(folder: Path, paths: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings and logits of image files, as the model card says."""
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = create_transform(**resolve_data_config({}, model=model), is_training=False)
    image_BCHW = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
    with torch.no_grad():
        embedding_BD = model.forward_head(model.forward_features(image_BCHW), pre_logits=True)
        return embedding_BD.double().numpy(), model(image_BCHW).numpy()


def test_timm_alone_gives_the_figure_of_a_cosine_rule_and_names_the_classes(adapted, export, shots, tmp_path):
    paths = sorted(make_shots(tmp_path / "new", {"red": 5, "green": 5, "blue": 5}, first=50).rglob("*.png"))
    embedding_BD, logit_BK = by_timm(adapted, paths)
    kept = safetensors.numpy.load_file(adapted / "shots.safetensors")
    names = list(json.loads((adapted / "adapt.json").read_text())["classes"])
    assert json.loads((adapted / "config.json").read_text())["label_names"] == names == ["blue", "green", "red"]
    for label, name in enumerate(names):  # timm's preprocessing and embedding
        own = by_timm(export, sorted((shots / name).iterdir()))[0]
        np.testing.assert_allclose(kept["view"][kept["label"] == label, 0], own, atol=1e-5)
    mean_SD = kept["view"].mean(1)
    centre = np.mean([mean_SD[kept["label"] == k].mean(0) for k in range(3)], axis=0)
    unit = [(x - centre) / np.linalg.norm(x - centre) for x in mean_SD]
    centroid = [np.mean([u for u, k in zip(unit, kept["label"], strict=True) if k == own], axis=0) for own in range(3)]
    cosine = [
        [c @ (f - centre) / np.linalg.norm(c) / np.linalg.norm(f - centre) for c in centroid] for f in embedding_BD
    ]
    assert (np.argmax(cosine, 1) == logit_BK.argmax(1)).all()
    ratio = logit_BK / np.array(cosine) / np.linalg.norm(embedding_BD - centre, axis=1, keepdims=True)
    np.testing.assert_allclose(ratio, ratio.mean(), rtol=1e-3)


def test_onnx_gives_the_logits_of_timm(adapted: Path, shots: Path) -> None:
    model = timm.create_model(f"local-dir:{adapted}", pretrained=True).eval()
    image_BCHW = torch.randn(3, 3, 32, 32)
    session = onnxruntime.InferenceSession(str(adapted / "model.onnx"))
    (logit_BK,) = session.run(["logits"], {"image": image_BCHW.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(logit_BK, model(image_BCHW), atol=1e-4)


@pytest.mark.parametrize("method", ["prototypes", "logistic"])
def test_a_class_is_added_without_the_images_of_the_others(method: str, export: Path, tmp_path: Path) -> None:
    first, later = make_shots(tmp_path / "first", {"red": 4, "green": 3}), make_shots(tmp_path / "later", {"grey": 3})
    shutil.copytree(first, tmp_path / "all")
    shutil.copytree(later, tmp_path / "all", dirs_exist_ok=True)
    start = dpkd.adapt(export, first, out=tmp_path / "two", method=method, onnx=False)
    shutil.rmtree(first)
    added = dpkd.adapt(start.folder, later, out=tmp_path / "three", method=method, onnx=False)
    assert added.classes == ("green", "red", "grey")
    assert added.measured.num_shots == 10
    paths = sorted((tmp_path / "all").rglob("*.png"))
    at_once = dpkd.adapt(export, tmp_path / "all", out=tmp_path / "once", method=method, onnx=False)
    logits = [by_timm(each.folder, paths)[1][:, np.argsort(each.classes)] for each in (added, at_once)]
    unscaled = [logit_BK / logit_BK.std() for logit_BK in logits]  # random crops and folds follow the order of images
    assert np.corrcoef(unscaled[0].ravel(), unscaled[1].ravel())[0, 1] > 0.9


def test_the_same_seed_gives_the_same_bits_by_every_method(export: Path, shots: Path, tmp_path: Path) -> None:
    for method in ("auto", "logistic", "fine_tune"):
        places = [tmp_path / f"{method}{i}" for i in (1, 2)]
        first, again = (dpkd.adapt(export, shots, out=place, method=method, onnx=False) for place in places)
        assert first.measured == again.measured
        assert len({(each.folder / "model.safetensors").read_bytes() for each in (first, again)}) == 1
    with pytest.raises(UserError, match=r"was made by fine_tune.*--method prototypes or logistic"):
        dpkd.adapt(first.folder, shots, out=tmp_path / "five")


def test_one_shot_of_a_class_is_said_to_measure_nothing(export: Path, tmp_path: Path, capsys) -> None:
    shots = make_shots(tmp_path / "one", {"red": 1, "blue": 2})
    assert cli.main(["adapt", str(export), "--shots", str(shots), "--out", str(tmp_path / "out")]) == 0
    assert "its accuracy is not known" in capsys.readouterr().out
    assert "its accuracy is not known" in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "adapt.json").read_text())["measured"] is None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("shots/red/0.png", "red/0.png: .*; replace or remove the image"),
        ("one class", "has one class, red: give at least two"),
        ("no classes", "was read as all images in one folder.*<class>"),
        ("no images", "--shots .* does not exist"),
        ("no export", "has no config.json: give a folder that `dpkd export` has written"),
        ("other weights", "cannot be loaded by timm"),
        ("method", r"--method prototype: no such method \(did you mean 'prototypes'\?\)"),
        ("known class", "has the class blue already"),
    ],
)
def test_what_cannot_be_used_is_refused_and_leaves_no_folder(spoil, message, export, adapted, tmp_path) -> None:
    shots, start, method = make_shots(tmp_path / "shots", {"red": 1, "blue": 1}), tmp_path / "start", "auto"
    shutil.copytree(adapted if spoil == "known class" else export, start)
    match spoil:
        case "shots/red/0.png":
            (shots / "red" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n")
        case "one class":
            shutil.rmtree(shots / "blue")
        case "no classes":
            shots = shots / "red"
        case "no images":
            shutil.rmtree(shots)
        case "no export":
            (start / "config.json").unlink()
        case "other weights":
            safetensors.numpy.save_file({"other": np.zeros(3)}, start / "model.safetensors")
        case "method":
            method = "prototype"
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=message):
        dpkd.adapt(start, shots, out=tmp_path / "out", method=method)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_folder_in_use_is_left_as_it_is(export: Path, shots: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("of the user")
    with pytest.raises(UserError, match=r"exists already and is never overwritten"):
        dpkd.adapt(export, shots, out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize(("correct", "count"), [(0, 4), (9, 25), (25, 25), (81, 100)])
def test_the_interval_ends_where_a_tail_of_the_binomial_has_two_and_a_half_percent(correct: int, count: int) -> None:
    low, high = Measured(correct, count, scale=1).interval

    def at_least(least: int, share: float) -> float:
        return sum(comb(count, k) * share**k * (1 - share) ** (count - k) for k in range(least, count + 1))

    assert low == 0 if correct == 0 else at_least(correct, low) == pytest.approx(0.025)
    assert high == 1 if correct == count else 1 - at_least(correct + 1, high) == pytest.approx(0.025)


def test_folds_are_stratified_and_no_shot_is_classified_by_itself() -> None:
    label_S = np.array([0] * 7 + [1] * 4)
    left_out_by_fold = []

    def classify(learn: np.ndarray, left_out: np.ndarray) -> np.ndarray:
        left_out_by_fold.append(left_out)
        assert sorted([*learn, *left_out]) == list(range(11))
        return np.stack([left_out, -left_out], axis=1)

    logit_SK = out_of_fold(classify, label_S, seed=1)
    assert len(left_out_by_fold) == 4 < MAX_FOLDS
    for label in (0, 1):
        assert np.ptp([(label_S[left_out] == label).sum() for left_out in left_out_by_fold]) <= 1
    np.testing.assert_array_equal(logit_SK, np.stack([np.arange(11), -np.arange(11)], axis=1))
    assert out_of_fold(classify, np.array([0, 0, 1]), seed=1) is None


def test_the_scale_minimises_the_log_loss_and_stays_finite() -> None:
    rng = np.random.default_rng(0)
    label_S = rng.integers(0, 3, 4000)
    logit_SK = rng.normal(0, 1, (4000, 3))
    share_SK = np.exp(4 * logit_SK) / np.exp(4 * logit_SK).sum(1, keepdims=True)
    label_S = np.array([rng.choice(3, p=share_K) for share_K in share_SK])  # for which softmax of 4 times is right
    assert measure(logit_SK, label_S).scale == pytest.approx(4, rel=0.1)
    assert measure(np.eye(3)[[0, 1, 2]] * 5, np.arange(3)).scale < 4


@pytest.mark.parametrize("num_classes", [2, 4])
def test_a_folded_logistic_head_gives_the_probabilities_of_scikit_learn(num_classes: int) -> None:
    rng = np.random.default_rng(2)
    label_S = np.repeat(np.arange(num_classes), 6)
    x_SD = rng.normal(0, 1, (len(label_S), 5)) + 20 + rng.normal(0, 2, (num_classes, 5))[label_S]
    centre_D = np.mean([x_SD[label_S == k].mean(0) for k in range(num_classes)], axis=0)
    size = np.sqrt(((x_SD - centre_D) ** 2).sum(1).mean())
    reference = LogisticRegression(C=10.0, class_weight="balanced", max_iter=1000).fit(
        (x_SD - centre_D) / size, label_S
    )
    logit_SK = logistic(x_SD[:, None], label_S).logits(x_SD)
    share_SK = np.exp(logit_SK) / np.exp(logit_SK).sum(1, keepdims=True)
    np.testing.assert_allclose(share_SK, reference.predict_proba((x_SD - centre_D) / size), atol=1e-6)


def test_prototypes_do_not_depend_on_the_number_of_shots_of_a_class() -> None:
    x_SD = np.random.default_rng(4).normal(0, 1, (4, 6))
    many = np.concatenate([x_SD[:2], np.repeat(x_SD[2:], 5, axis=0)])
    few, uneven = (
        prototypes(x_SD, np.array([0, 0, 1, 1])),
        prototypes(many, np.array([0] * 2 + [1] * 10)),
    )
    rows, uneven_rows = (head.weight_KD / np.linalg.norm(head.weight_KD, axis=1)[:, None] for head in (few, uneven))
    np.testing.assert_allclose(rows, uneven_rows, atol=1e-12)


def test_a_folder_of_another_version_takes_no_further_class(adapted: Path, shots: Path, tmp_path: Path) -> None:
    older = shutil.copytree(adapted, tmp_path / "older")
    card = json.loads((older / "adapt.json").read_text())
    (older / "adapt.json").write_text(json.dumps(card | {"format_version": 1}))
    with pytest.raises(UserError, match="written by another version of dpkd: adapt with the shots of all classes"):
        dpkd.adapt(older, shots, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
