"""Segmentation from a folder of images with few masks to an export that is used without dpkd, as a user does it."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime
import pytest
import torch

from dpkd import cli
from dpkd.data.images import decode_image, encode_png
from dpkd.engine.world import World
from dpkd.errors import UserError
from dpkd.evaluation.segmenter import Segmenter
from dpkd.models.saved import load_network
from dpkd.priors.store import PriorSet
from dpkd.run.folder import RunFolder
from dpkd.settings import load_settings
from dpkd.stages.masks import segment_with
from dpkd.stages.run import Run, supervision, training_set
from dpkd.stages.training import sample_order
from dpkd.verbs.predict import predict
from tests.runs import CONV, VIT, Command, all_weights, settings_of

TEACHER = [
    {"kind": "segmentation", "hidden": 8},
    {"kind": "mask_consistency", "threshold": 0.5, "share": 0.5},
    {"kind": "mask_smoothness", "weight": 0.1},
    {"kind": "mask_saliency", "weight": 0.1},
]
STUDENT = [{"kind": "segmentation", "hidden": 8}, {"kind": "mask_logits"}]


def draw_discs(folder: Path, counts: dict[str, int]) -> Path:
    """Bright discs on a dark ground, of several sizes of image, with their masks."""
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        (folder / split).mkdir(parents=True)
        for i in range(count):
            height, width = 40, 40 + 8 * (i % 3)
            mask = np.zeros((height, width), np.uint8)
            cv2.circle(
                mask, (int(rng.integers(8, width - 8)), int(rng.integers(8, 32))), int(rng.integers(4, 12)), 1, -1
            )
            image = np.where(mask[:, :, None] > 0, 200, 40) + rng.integers(0, 30, (height, width, 3))
            (folder / split / f"{i:02}.png").write_bytes(encode_png(image.astype(np.uint8)))
            (folder / split / f"{i:02}.mask.png").write_bytes(encode_png(mask))
    return folder


def tree_of(run_dir: Path, source: Path, **masks: Any) -> dict[str, Any]:
    training: dict[str, Any] = {
        "steps": 30,
        "batch_size": 8,
        "micro_batch_size": 4,
        "log_every": 5,
        "checkpoint_every": 4,
    }
    training |= {"labelled_share": 0.5, "precision": "fp32"}
    engine = {"optimizer": {"learning_rate": 0.01}, "engine": {"kind": "torch"}}
    teacher = {"model": CONV, "objectives": TEACHER, "training": training, **engine}
    return {
        "run": {"dir": str(run_dir)},
        "launcher": {"kind": "local", "workers": 1, "pool_workers": 1, "threads": 1},
        "data": {
            "source": str(source),
            "val": None,
            "image_size": 32,
            "map_size": 16,
            "masks": {"kind": "figure_ground", "visible": {"kind": "count", "count": 3}} | masks,
            "loader": {"workers": 0},
        },
        "teachers": {"teacher": teacher},
        "distill": {
            "students": {"conv": {"model": CONV, "objectives": STUDENT, **engine}},
            "training": training,
        },
        "evaluate": {"probes": None},
    }


@pytest.fixture(scope="module")
def segmented(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A whole run on images of which three show their mask, one mask is wrong and one too small; read only."""
    source = draw_discs(tmp_path_factory.mktemp("discs") / "images", {"train": 16, "test": 6})
    (source / "train" / "03.mask.png").write_bytes(encode_png(np.zeros((4, 4), np.uint8)))
    tree = tree_of(tmp_path_factory.mktemp("runs") / "masks", source)
    tree["data"]["bad_limit"] = 0.1
    command = Command(tree)
    assert command.wait() == 0, command.output
    return command.folder


def test_a_run_ends_with_figures_of_masks(segmented: RunFolder) -> None:
    report = json.loads((segmented.path / "evaluation.json").read_text())
    student, baseline = report["students"]["conv"], report["baselines"]["conv"]
    assert report["labelled"] == {"test": 6}
    assert list(student["scores"]["test"]) == ["mean_dice", "boundary_iou", "boundary_f", "mean_iou"]
    assert student["scores"]["test"]["mean_iou"]["mean"] > 0.6  # discs are bright
    gain = student["scores"]["test"]["mean_iou"]["mean"] - baseline["scores"]["test"]["mean_iou"]["mean"]
    assert abs(student["over_baseline"]["test"]["mean_iou"]["mean"] - gain) < 1e-12
    assert set(student["segmentation"]["test"]) == {"ground", "figure"}
    words = (segmented.path / "summary.md").read_text()
    assert "| mean IoU |" in words
    assert "figure HD95" in words
    assert "reaches a mean IoU of" in (segmented.path / "report.html").read_text()
    assert decode_image((segmented.path / "masks-test.png").read_bytes()).ndim == 3
    assert "the mask is 4x4, and the image is 40x40" in segmented.quarantine.read_text()


def test_figures_are_those_of_the_exported_folder(segmented: RunFolder) -> None:
    report = json.loads((segmented.path / "evaluation.json").read_text())["students"]["conv"]["segmentation"]["test"]
    segmenter = Segmenter(segmented.export / "conv")
    overlap = union = 0
    for path in sorted((Path(json_source(segmented)) / "test").glob("[0-9][0-9].png")):
        mask = decode_image(path.with_suffix(".mask.png").read_bytes())[:, :, 0] > 0
        found = segmenter.segment(decode_image(path.read_bytes())) == 1
        overlap, union = overlap + (mask & found).sum(), union + (mask | found).sum()
    np.testing.assert_allclose(report["figure"]["iou"], overlap / union, rtol=1e-3)


def json_source(folder: RunFolder) -> str:
    return re.search(r"path: (.*images)", (folder.path / "settings.yaml").read_text())[1]  # type: ignore[index]


def test_the_model_card_segments_in_a_process_without_dpkd(segmented: RunFolder, tmp_path: Path) -> None:
    folder = segmented.export / "conv"
    code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[-1]
    image = Path(json_source(segmented)) / "test" / "01.png"
    (tmp_path / "image.jpg").write_bytes(image.read_bytes())
    (tmp_path / "conv").symlink_to(folder)
    code = "import sys; sys.modules['dpkd'] = None\n" + code + "\nnp.save('mask.npy', mask)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    expected = segment_with(load_network(segmented.students / "conv"), decode_image(image.read_bytes()), tile=None)
    np.testing.assert_array_equal(np.load(tmp_path / "mask.npy"), expected)
    assert expected.shape == (40, 48)


def test_onnx_has_the_logits_of_the_head(segmented: RunFolder) -> None:
    segmenter = Segmenter(segmented.export / "conv")
    image_B3HW = torch.randn(2, 3, 32, 32)
    session = onnxruntime.InferenceSession(str(segmented.export / "conv" / "model.onnx"))
    (logits_BKHW,) = session.run(["segmentation"], {"image": image_B3HW.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(logits_BKHW, segmenter(image_B3HW).numpy(), atol=1e-3)


def test_predict_writes_masks_beside_the_folders_of_the_images(segmented: RunFolder, tmp_path: Path) -> None:
    photos = draw_discs(tmp_path / "photos", {"a": 2, "b": 1})
    (photos / "b" / "broken.png").write_bytes(b"no image")
    export = segmented.export / "conv"
    assert cli.main(["predict", str(export), str(photos), "--out", str(tmp_path / "out")]) == 2  # one is broken
    written = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png"))
    assert written == ["a/00.mask.png", "a/01.mask.png", "b/00.mask.png"]
    mask = decode_image((tmp_path / "out" / "a" / "01.mask.png").read_bytes())[:, :, 0]
    image = decode_image((photos / "a" / "01.png").read_bytes())
    np.testing.assert_array_equal(mask, Segmenter(export).segment(image) * 255)
    with pytest.raises(UserError, match="give a folder for the masks"):
        predict(export, photos)


def test_tiles_cover_an_image_of_any_shape(segmented: RunFolder) -> None:
    network = load_network(segmented.students / "conv")
    image = np.random.default_rng(0).integers(0, 255, (33, 150, 3), np.uint8)
    assert segment_with(network, image, tile=16).shape == (33, 150)
    assert segment_with(network, image, tile=None).shape == (33, 150)
    square = image[:, :33]
    np.testing.assert_array_equal(segment_with(network, square, tile=None), segment_with(network, square, tile=500))


def test_a_killed_run_continues_with_the_same_weights(segmented: RunFolder, tmp_path: Path) -> None:
    tree = tree_of(tmp_path / "killed", Path(json_source(segmented)))
    tree["data"]["bad_limit"] = 0.1
    stages = ("--stages", "pack,prepare,teach,distill")
    killed = Command(tree, *stages)
    killed.wait_for_step("distill", 10)
    killed.kill_all()
    again = Command(tree, *stages)
    assert again.wait() == 0, again.output
    expected = all_weights(segmented)
    for name, tensor in all_weights(again.folder).items():
        assert torch.equal(tensor, expected[name]), name


def test_masks_with_unknown_values_are_quarantined_and_not_learnt_from(tmp_path: Path) -> None:
    source = draw_discs(tmp_path / "images", {"train": 12, "test": 4})
    (source / "train" / "05.mask.png").write_bytes(encode_png(np.full((40, 56), 7, np.uint8)))
    masks = {"kind": "classes", "classes": ["ground", "disc"], "visible": {"kind": "all"}}
    tree = tree_of(tmp_path / "run", source, **masks)
    tree["data"]["bad_limit"] = 0.1
    command = Command(tree, "--stages", "pack,prepare")
    assert command.wait() == 0, command.output
    assert "the mask has the value 7, and data.masks names the classes 0 to 1" in command.folder.quarantine.read_text()
    priors = PriorSet.open(str(command.folder.path / "shards"), "default")
    assert priors.split("train").bad_keys() == {"train/05"} or priors.split("train").bad_keys() == {"05"}
    del tree["data"]["bad_limit"]
    tree["run"]["dir"] = str(tmp_path / "strict")
    strict = Command(tree, "--stages", "pack,prepare")
    assert strict.wait() != 0


def test_what_does_not_fit_is_refused_before_work(tmp_path: Path) -> None:
    tree = tree_of(tmp_path / "run", tmp_path)
    for change, words in (
        (lambda t: t["data"].pop("masks"), "learns masks, but data.masks is not set"),
        (
            lambda t: t["teachers"]["teacher"]["objectives"].pop(0),
            "needs the objective segmentation of the same network",
        ),
        (lambda t: t["data"]["masks"].update(kind="classes"), "needs the names of the values"),
        (
            lambda t: t["teachers"]["teacher"]["objectives"].append({"kind": "masked_prior", "targets": {"mask": 1.0}}),
            "would read hidden masks",
        ),
        (
            lambda t: t["teachers"]["teacher"].update(objectives=[{"kind": "rotation"}]),
            "follows 'teacher', which has no objective segmentation",
        ),
    ):
        changed = json.loads(json.dumps(tree))
        change(changed)
        with pytest.raises(UserError, match=words):
            settings_of(changed)


def test_saliency_is_refused_for_more_than_two_classes_before_images_are_decoded(tmp_path: Path) -> None:
    tree = tree_of(tmp_path / "run", draw_discs(tmp_path / "images", {"train": 12, "test": 4}))
    tree["data"]["masks"] |= {"kind": "classes", "classes": ["ground", "disc", "ring"], "visible": {"kind": "all"}}
    tree["teachers"]["teacher"]["objectives"].append({"kind": "mask_saliency"})
    command = Command(tree)
    assert command.wait() == 2
    assert "'mask_saliency' tells figure from ground, and data.masks has 3 classes" in command.output
    assert not (tmp_path / "run" / "shards" / "dataset.json").exists()


def test_a_transformer_segments_at_its_patches(tmp_path: Path) -> None:
    source = draw_discs(tmp_path / "images", {"train": 8, "test": 2})
    tree = tree_of(tmp_path / "run", source)
    tree["teachers"] = {}
    student = {"model": VIT, "objectives": STUDENT[:1], "baseline": False, "engine": {"kind": "torch"}}
    tree["distill"]["students"] = {"vit": student}
    tree["distill"]["training"]["steps"] = 4
    command = Command(tree)
    assert command.wait() == 0, command.output
    settings = json.loads((command.folder.export / "vit" / "segmentation.json").read_text())
    assert settings["layers"] == [1]


def test_half_of_the_drawn_images_have_one_of_the_visible_masks(segmented: RunFolder) -> None:
    settings = load_settings(segmented.path / "settings.yaml", [])
    run = Run.open(settings, World(rank=0, size=1, local_rank=0, device=torch.device("cpu")))
    training = settings.distill.training
    data = training_set(run, training, [])
    order = sample_order(run, training, data)
    drawn = np.concatenate([order.batch(step) for step in range(10)])
    masked = set(np.flatnonzero(data.mask_N == 0).tolist())
    assert len(masked) == 3
    assert np.isin(drawn, list(masked)).mean() == 0.5
    assert set(drawn.tolist()) >= masked
    assert supervision(run, data, training).masked_share == 0.5
    assert (
        supervision(run, data, training.model_copy(update={"labelled_share": None})).masked_share
        == 3 / data.num_samples
    )
