"""Classes, embeddings and neighbours of images: against timm alone, with broken images, and without Ray."""

import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image, ImageOps

import dpkd
from dpkd import cli
from dpkd.data.settings import Window
from dpkd.errors import UserError
from dpkd.report.model_card import USAGE
from dpkd.verbs.predict import refuse_broken
from tests.exports import make_shots, write_export


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export(tmp_path_factory.mktemp("students") / "conv", classes=("a", "b", "c"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of every kind, at two depths, beside files that are none."""
    folder = make_shots(tmp_path_factory.mktemp("photos") / "all", {"red": 2, "blue": 2})
    smooth = Image.effect_noise((90, 60), 90).resize((300, 200)).convert("RGB")
    turned = smooth.getexif()
    turned[0x0112] = 6  # shown turned by 90 degrees
    smooth.save(folder / "turned.jpg", exif=turned)
    smooth.convert("L").save(folder / "grey.png")
    smooth.convert("P").save(folder / "palette.png")
    smooth.convert("RGBA").save(folder / "alpha.webp", lossless=True)
    smooth.convert("L").save(folder / "turned.mask.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def by_model_card(folder: Path, file: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The variables after the code of the model card, run as it stands on one image."""
    place.mkdir(exist_ok=True)
    (place / "image.jpg").write_bytes(Path(file).read_bytes())
    (place / folder.name).symlink_to(folder) if not (place / folder.name).exists() else None
    monkeypatch.chdir(place)
    code = re.search(r"```python\n(.*?)```", USAGE.format(folder=folder.name, activation="softmax(1)"), re.DOTALL)
    assert code is not None
    found: dict[str, Any] = {}
    exec(code[1], found)
    return found


def test_classes_and_embeddings_are_those_of_the_model_card(student, photos, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("dpkd.verbs.predict.BATCH_SIZE", 3)
    classes, embeddings = dpkd.predict(student, photos).to_pylist(), dpkd.embed(student, photos).to_pylist()
    assert len(classes) == 8
    assert ImageOps.exif_transpose(Image.open(photos / "turned.jpg")).size == (200, 300)
    for row, embedded in zip(classes, embeddings, strict=True):
        expected = by_model_card(student, row["file"], tmp_path / "card", monkeypatch)
        np.testing.assert_allclose([row["p_a"], row["p_b"], row["p_c"]], expected["probability"], atol=1e-5)
        np.testing.assert_allclose(embedded["embedding"], expected["embedding"][0], rtol=1e-4, atol=1e-5)
        best = int(np.argmax(expected["probability"]))
        assert (row["class"], row["error"], embedded["file"]) == ("abc"[best], None, row["file"])
        assert row["confidence"] == max(row["p_a"], row["p_b"], row["p_c"])


def test_folders_are_read_at_any_depth_without_masks_and_each_file_once(student: Path, photos: Path) -> None:
    found = dpkd.predict(student, [photos / "turned.jpg", photos])["file"].to_pylist()
    names = ["turned.jpg", "alpha.webp", "blue/0.png", "blue/1.png", "grey.png", "palette.png", "red/0.png"]
    assert found == [str(photos / name) for name in [*names, "red/1.png"]]


def test_all_formats_hold_the_same_table(student: Path, photos: Path, tmp_path: Path) -> None:
    for suffix in ("csv", "jsonl", "parquet"):
        table = dpkd.predict(student, photos, out=tmp_path / f"p.{suffix}", top=2)
    expected = table.to_pandas()
    assert list(expected) == ["file", "class", "confidence", "class_2", "confidence_2", "error"]
    assert (expected["confidence"] >= expected["confidence_2"]).all()
    texts = pd.read_csv(tmp_path / "p.csv"), pd.read_json(tmp_path / "p.jsonl", lines=True)
    for found in (*texts, pd.read_parquet(tmp_path / "p.parquet")):
        pd.testing.assert_frame_equal(found, expected, check_dtype=False)


def test_a_broken_image_is_named_and_loses_no_other(student: Path, photos: Path, tmp_path: Path, capfdbinary) -> None:
    cut = tmp_path / "cut, short.jpg"
    cut.write_bytes((photos / "turned.jpg").read_bytes()[:-900])
    command = ["predict", str(student), str(cut), str(photos / "red")]
    assert cli.main(command) == 2
    shown, said = (stream.decode() for stream in capfdbinary.readouterr())
    rows = list(csv.DictReader(io.StringIO(shown)))
    assert [row["file"] for row in rows] == [str(cut), str(photos / "red/0.png"), str(photos / "red/1.png")]
    assert (rows[0]["class"], rows[0]["confidence"], rows[0]["error"]) == ("", "", "the jpg is cut short")
    assert all(row["class"] and not row["error"] for row in rows[1:])
    assert f"{cut}: the jpg is cut short" in said
    assert "1 of 3 images cannot be read" in said
    out = tmp_path / "e.parquet"
    assert cli.main(["embed", str(student), str(cut), str(photos / "red"), "--out", str(out)]) == 2
    table = pa.parquet.read_table(out)
    assert table["embedding"].null_count == 1
    alone = dpkd.embed(student, photos / "red")["embedding"].combine_chunks().flatten()
    assert table["embedding"].combine_chunks().flatten().equals(alone)
    assert cli.main(["predict", str(student), str(photos / "red"), "--out", str(tmp_path / "p.csv")]) == 0


def test_embeddings_are_lists_of_one_size_that_pandas_stacks(student: Path, photos: Path, tmp_path: Path) -> None:
    dpkd.embed(student, photos, out=tmp_path / "e.parquet")
    assert pa.parquet.read_schema(tmp_path / "e.parquet").field("embedding").type == pa.list_(pa.float32(), 32)
    frame = pd.read_parquet(tmp_path / "e.parquet")
    assert np.stack(frame["embedding"]).shape == (8, 32)


def test_the_nearest_image_is_its_copy_and_never_the_query(student: Path, photos: Path, tmp_path: Path) -> None:
    query, copy = photos / "red" / "0.png", tmp_path / "copy.png"
    Image.open(query).save(copy)
    dpkd.embed(student, [photos, copy], out=tmp_path / "e.parquet")
    out = tmp_path / "sheet.png"
    command = ["neighbours", str(student), str(photos), str(copy), "--of", str(query), "--out", str(out), "--top", "4"]
    assert cli.main(command) == 0
    assert Image.open(out).size == (5 * 132, 20 + 132)
    tables = [dpkd.neighbours(student, place, of=query, top=4) for place in ([photos, copy], tmp_path / "e.parquet")]
    assert tables[0].equals(tables[1])
    assert tables[0]["file"][0].as_py() == str(copy)
    assert str(query) not in tables[0]["file"].to_pylist()
    rows = pd.read_parquet(tmp_path / "e.parquet").set_index("file")["embedding"]
    of = rows[str(query)]
    cosine = [
        of @ rows[file] / np.linalg.norm(of) / np.linalg.norm(rows[file]) for file in tables[0]["file"].to_pylist()
    ]
    np.testing.assert_allclose(tables[0]["similarity"], cosine, rtol=1e-5)
    assert cosine == sorted(cosine, reverse=True)
    other = write_export(tmp_path / "other", seed=4)
    with pytest.raises(UserError, match=r"e.parquet was not written by `dpkd embed .*other`"):
        dpkd.neighbours(other, tmp_path / "e.parquet", of=query)


def test_a_student_without_classes_embeds_and_points_to_adapt(photos: Path, tmp_path: Path, monkeypatch) -> None:
    student = write_export(tmp_path / "plain", classes=())
    with pytest.raises(UserError, match=r"has no classes: `dpkd adapt .*plain --shots FOLDER`"):
        dpkd.predict(student, photos)
    (row,) = dpkd.embed(student, photos / "turned.jpg").to_pylist()
    expected = by_model_card(student, row["file"], tmp_path / "card", monkeypatch)
    np.testing.assert_allclose(row["embedding"], expected["embedding"][0], rtol=1e-4, atol=1e-5)


def test_an_adapted_folder_predicts_its_own_shots(student: Path, tmp_path: Path) -> None:
    shots = make_shots(tmp_path / "shots", {"red": 4, "green": 4})
    folder = dpkd.adapt(student, shots, method="logistic", onnx=False).folder
    rows = dpkd.predict(folder, shots).to_pylist()
    assert [row["class"] for row in rows] == [Path(row["file"]).parent.name for row in rows]


def test_images_of_16_bits_are_mapped_as_in_training(tmp_path: Path) -> None:
    folder = write_export(tmp_path / "deep", window=Window(low=1000, high=5000))
    deep, shallow = tmp_path / "16/deep", tmp_path / "8/deep"
    for number, place in enumerate((deep, shallow) * 2):
        name = "ab"[number // 2]
        (place / name).mkdir(parents=True)
        grey = np.random.default_rng(number // 2).integers(0, 256, (40, 30))
        of_16 = np.round(1000 + grey * 4000 / 255).astype(np.uint16)
        Image.fromarray(of_16 if place is deep else grey.astype(np.uint8)).save(place / name / "0.png")
    adapted = dpkd.adapt(folder, deep, method="prototypes", onnx=False).folder  # keeps the window
    for export in (folder, adapted):
        found, expected = (dpkd.predict(export, place).drop(["file"]).to_pylist() for place in (deep, shallow))
        assert found == expected
    dpkd.neighbours(folder, deep, of=deep / "a", out=tmp_path / "sheet.png")
    with pytest.raises(UserError, match="2 images cannot be read"):
        refuse_broken(dpkd.predict(write_export(tmp_path / "shallow"), deep))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"photos": "missing"}, "missing does not exist"),
        ({"photos": "empty"}, "empty has no image"),
        ({"out": "p.xlsx"}, r"p.xlsx: give a file that ends in .csv or .jsonl or .parquet"),
        ({"top": 0}, "--top 0: give a number from 1"),
        ({"export": "empty"}, "empty has no config.json"),
    ],
)
def test_what_cannot_be_done_is_refused_and_leaves_no_file(changes, message, student, photos, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    call = {"export": student, "photos": photos, "out": "p.csv", "top": None} | changes
    for name in ("photos", "out", "export"):
        call[name] = tmp_path / call[name]
    with pytest.raises(UserError, match=message):
        dpkd.predict(**call)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_no_ray_and_no_deepspeed_is_loaded(student: Path, photos: Path, tmp_path: Path) -> None:
    code = f"""
import sys, dpkd
shots = dpkd.adapt({str(student)!r}, {str(make_shots(tmp_path / "s", {"red": 1, "blue": 1}))!r}, onnx=False)
dpkd.predict(shots.folder, {str(photos)!r})
dpkd.neighbours({str(student)!r}, {str(photos)!r}, of={str(photos / "grey.png")!r})
print(json := [name for name in ("ray", "deepspeed", "numba") if name in sys.modules], file=sys.stderr)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(ended.stderr) == []
