"""What leaves: loaded by plain timm with no dpkd to import, and by ONNX Runtime."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform

from dpkd.data.augment import apply_image, centre_view, normalise
from dpkd.data.images import decode_image
from dpkd.errors import UserError
from dpkd.models.network import Network
from dpkd.models.saved import load_network
from dpkd.run.folder import RunFolder
from dpkd.settings import ExportSettings
from dpkd.stages.export import _replace, export, write_onnx
from dpkd.stages.run import Run

WITHOUT_DPKD = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "dpkd":
            raise ImportError("dpkd is not installed here")
sys.meta_path.insert(0, Blocked())
import numpy, timm, torch
torch.set_num_threads(1)
folder, images, results = sys.argv[1:]
model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
image = torch.from_numpy(numpy.load(images))
with torch.no_grad():
    embedding = model.forward_head(model.forward_features(image), pre_logits=True)
    logits = model(image)
config = timm.data.resolve_data_config({}, model=model)
given = {"mean": config["mean"], "std": config["std"], "size": config["input_size"]}
numpy.savez(results, embedding=embedding, logits=logits, **given)
assert not any(name.split(".")[0] == "dpkd" for name in sys.modules)
"""


def exporting(run: Run, **changes: Any) -> Run:
    """The run with other settings of the export."""
    return dataclasses.replace(
        run, settings=run.settings.model_copy(update={"export": ExportSettings().model_copy(update=changes)})
    )


@pytest.fixture(scope="session")
def exported_run(evaluated_run: Run) -> Run:
    export(evaluated_run)
    return evaluated_run


def images(network: Network, count: int) -> torch.Tensor:
    side = network.spec.image_size
    return torch.from_numpy(np.random.default_rng(5).standard_normal((count, 3, side, side), np.float32))


@pytest.mark.parametrize("student", ["conv", "vit"])
def test_plain_timm_loads_the_folder_where_dpkd_cannot_be_imported(
    exported_run: Run, student: str, tmp_path: Path
) -> None:
    network = load_network(exported_run.folder.students / student)
    spec = network.spec
    image_BCHW = images(network, 4)
    np.save(tmp_path / "images.npy", image_BCHW.numpy())
    arguments = [exported_run.folder.export / student, tmp_path / "images.npy", tmp_path / "results.npz"]
    command = [sys.executable, "-I", "-c", WITHOUT_DPKD, *map(str, arguments)]
    subprocess.run(command, check=True, cwd=tmp_path)
    found = np.load(tmp_path / "results.npz")
    with torch.no_grad():
        # a blank map weighs all patches alike, which is timm's plain pooling
        expected = network(image_BCHW, torch.zeros(4, 1, 8, 8))
    np.testing.assert_allclose(found["embedding"], expected["embedding"], atol=1e-5)
    np.testing.assert_allclose(found["logits"], expected["logits"], atol=1e-5)
    assert found["mean"].tolist() == pytest.approx(spec.mean)
    assert found["std"].tolist() == pytest.approx(spec.std)
    assert found["size"].tolist() == [3, 32, 32]


def test_preprocessing_of_timm_gives_what_the_network_was_trained_on(exported_run: Run) -> None:
    spec = load_network(exported_run.folder.students / "conv").spec
    model = timm.create_model(f"local-dir:{exported_run.folder.export / 'conv'}", pretrained=True)
    transform = create_transform(**resolve_data_config({}, model=model), is_training=False)
    image_HWC = decode_image(exported_run.dataset.split("novel").read(0).image)[:, :40]  # higher than wide
    seen_HWC = apply_image(centre_view(image_HWC.shape[:2]), image_HWC, size=spec.image_size)
    ours = normalise(torch.from_numpy(seen_HWC).permute(2, 0, 1)[None], mean=spec.mean, std=spec.std)[0]
    difference = (transform(Image.fromarray(image_HWC)) - ours).abs()  # Pillow and OpenCV weigh pixels differently
    assert difference.mean() < 0.05 * ours.std()


@pytest.mark.parametrize("student", ["conv", "vit"])
@pytest.mark.parametrize("batch_size", [1, 7])
def test_onnx_gives_the_outputs_of_pytorch_at_any_batch_size(exported_run: Run, student: str, batch_size: int) -> None:
    network = load_network(exported_run.folder.students / student)
    session = onnxruntime.InferenceSession(str(exported_run.folder.export / student / "model.onnx"))
    image_BCHW = images(network, batch_size)
    weight_B1HW = torch.rand(batch_size, 1, exported_run.map_size, exported_run.map_size)
    inputs = {"image": image_BCHW.numpy(), "weight": weight_B1HW.numpy()}
    names = [each.name for each in session.get_inputs()]
    assert names == (["image", "weight"] if student == "vit" else ["image"])
    embedding_BD, logits_BK = session.run(["embedding", "logits"], {name: inputs[name] for name in names})
    with torch.no_grad():
        expected = network(image_BCHW, weight_B1HW)
    np.testing.assert_allclose(embedding_BD, expected["embedding"], atol=1e-4)
    np.testing.assert_allclose(logits_BK, expected["logits"], atol=1e-4)


def test_the_folder_names_classes_and_holds_its_own_numbers(exported_run: Run) -> None:
    folder = exported_run.folder.export / "vit"
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "model.onnx", "model.safetensors"}
    spec = load_network(exported_run.folder.students / "vit").spec
    assert json.loads((folder / "config.json").read_text())["label_names"] == list(spec.classes)
    report = json.loads((exported_run.folder.path / "evaluation.json").read_text())
    score = report["students"]["vit"]["plain_pooling"]["novel"]["4way_5shot"]
    card = (folder / "README.md").read_text()
    assert f"{100 * score['mean']:.1f} ± {100 * score['ci95']:.1f} %" in card
    assert card.startswith("---\nlibrary_name: timm\n")
    assert "Figure-ground pooling" in card


def test_exporting_again_replaces_the_folder_whole(exported_run: Run, tmp_path: Path) -> None:
    shutil.copytree(exported_run.folder.path, tmp_path / "run", ignore=shutil.ignore_patterns("shards"))
    run = dataclasses.replace(exported_run, folder=RunFolder(tmp_path / "run"))
    (run.folder.export / "conv" / "stray").write_text("of an earlier export")
    export(exporting(run, onnx=False))
    assert sorted(path.name for path in run.folder.export.iterdir()) == ["conv", "vit"]
    assert {path.name for path in (run.folder.export / "conv").iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
    }


def test_a_model_that_cannot_be_written_as_onnx_is_named_with_a_way_out(exported_run: Run, tmp_path: Path) -> None:
    network = load_network(exported_run.folder.students / "conv")
    network.register_forward_hook(lambda *found: found[-1] if float(found[-1]["embedding"].sum()) > 0 else None)
    with pytest.raises(UserError, match=r"cannot be written as ONNX \(.*export\.onnx=false"):
        write_onnx(tmp_path / "model.onnx", network, map_size=4, tolerance=1e-3)


def test_an_export_that_was_taken_away_leaves_the_one_that_stands(tmp_path: Path) -> None:
    standing = tmp_path / "conv"
    standing.mkdir()
    (standing / "config.json").write_text("whole")
    with pytest.raises((OSError, UserError)):
        _replace(standing, tmp_path / "taken-away")
    assert (standing / "config.json").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["conv"]


def test_onnx_beyond_the_tolerance_is_refused(exported_run: Run, tmp_path: Path) -> None:
    network = load_network(exported_run.folder.students / "conv")
    with pytest.raises(UserError, match=r"ONNX gives other outputs than PyTorch.*export\.tolerance"):
        write_onnx(tmp_path / "model.onnx", network, map_size=8, tolerance=1e-12)
