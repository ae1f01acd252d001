"""A call without a config file: what is chosen for which images, and whole runs from images to exported students."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import yaml

import dpkd
from dpkd import cli, pretrain
from dpkd.defaults import chosen_settings
from dpkd.errors import UserError
from dpkd.settings import Settings
from tests.data.packing import image_bytes, make_folder

SHORT = [
    "launcher.threads=1",
    "data.image_size=32",
    "data.loader.workers=0",
    "distill.training.epochs=1",
    "distill.training.batch_size=8",
    "evaluate.probes=null",
    "export.onnx=false",
]
OWN_TEACHER = ["teachers.teacher.training.epochs=1", "teachers.teacher.training.batch_size=8"]


def chosen(source: Path, *overrides: str, **options: Any) -> Settings:
    settings, text = chosen_settings(str(source), overrides, **options)
    assert settings == Settings.model_validate(yaml.safe_load(text))  # chosen.yaml is the run's settings
    assert chosen_settings(str(source), overrides, **options) == (settings, text)  # a second call continues the run
    return settings


@pytest.mark.parametrize(
    ("labels", "fractions", "val", "test"),
    [
        (60, {"train": 0.8, "val": 0.1, "test": 0.1}, "val", "test"),
        (20, {"train": 0.8, "val": 0.2}, "val", None),
        (5, {"train": 0.8, "val": 0.2}, "val", None),
        (4, None, None, None),
    ],
)
def test_images_are_held_out_where_enough_are_labelled(labels, fractions, val, test, tmp_path) -> None:
    settings = chosen(make_folder(tmp_path / "photos", counts={"cat": labels, "dog": labels, "unlabelled": 30}))
    data = settings.data
    assert getattr(data.splits, "fractions", None) == fractions
    assert (data.val, data.test) == (val, test)
    assert settings.evaluate is not None
    assert (settings.evaluate.episodes is None) == (val is not None)
    assert settings.distill.training.labelled_share == (0.5 if labels < 20 else None)


def test_images_without_labels_need_none(tmp_path: Path) -> None:
    settings = chosen(make_folder(tmp_path, counts={"": 20}))
    assert not [o for o in settings.objectives.values() if "class" in o.needs().targets]
    assert not settings.data.evaluated_splits
    assert not any(student.baseline for student in settings.distill.students.values())


def test_rare_classes_have_a_recipe_with_its_reason(tmp_path: Path) -> None:
    _, text = chosen_settings(str(make_folder(tmp_path / "long", counts={"cat": 30, "dog": 10, "unlabelled": 4})))
    chosen_for_both = "logit adjusted for rare classes, because the largest class has 24 labels, and the smallest 8"
    assert text.count(chosen_for_both) == 2
    settings = chosen(make_folder(tmp_path / "even", counts={"cat": 12, "dog": 12}))
    assert [training.imbalance for training in settings.trainings.values()] == ["auto", "auto"]


def test_splits_of_the_source_are_kept_and_new_classes_are_measured_by_episodes(tmp_path: Path) -> None:
    known = chosen(
        make_folder(tmp_path / "a", counts={"training/x": 9, "training/y": 9, "valid/x": 4, "test2017/y": 4})
    )
    assert (known.data.train, known.data.val, known.data.test) == ("training", "valid", "test2017")
    assert known.evaluate is not None
    assert known.evaluate.episodes is None
    new = chosen(
        make_folder(tmp_path / "b", counts={"base/x": 9, "base/y": 9, "novel/z": 24, "novel/w": 20, "novel/v": 3})
    )
    assert (new.data.train, new.data.val, new.data.test) == ("base", None, "novel")
    assert new.evaluate is not None
    assert new.evaluate.episodes is not None
    assert (new.evaluate.episodes.way, new.evaluate.episodes.shots, new.evaluate.episodes.queries) == (3, (1,), 1)
    with pytest.raises(UserError, match=r"splits novel, val: name the one for training, data.train=NAME"):
        chosen(make_folder(tmp_path / "c", counts={"novel/x": 9, "val/y": 9}))


def test_columns_of_a_table_are_found_by_their_names(tmp_path: Path) -> None:
    make_folder(tmp_path, counts={"images": 60})
    rows = [f"{i},images/{i:03d}.jpg,{float(i % 2)},p{i // 4}" for i in range(60)]  # as pandas writes it
    (tmp_path / "cases.csv").write_text("\n".join(["Unnamed: 0,Filename,Diagnosis,patient", *rows]))
    source = chosen(tmp_path / "cases.csv").data.source
    assert source is not None
    columns = {key: column for key, column in source.model_dump().items() if key.endswith("_column") and column}
    assert columns == {"path_column": "Filename", "label_column": "Diagnosis", "group_column": "patient"}


def test_what_is_given_wins_and_a_wrong_key_is_named(tmp_path: Path) -> None:
    photos = make_folder(tmp_path / "photos", counts={"cat": 12, "dog": 12})
    settings = chosen(photos, "data.val=null", "run.dir=runs/mine", "data.image_size=48", students="resnet18,resnet34")
    assert (settings.data.val, settings.run.dir, settings.data.image_size) == (None, "runs/mine", 48)
    assert list(settings.distill.students) == ["resnet18", "resnet34"]
    assert list(chosen(photos, "distill.students.a.model=resnet34").distill.students) == ["resnet10t", "a"]
    assert list(chosen(photos, "distill.students.b=null", students="a,b").distill.students) == ["a"]
    with pytest.raises(UserError, match=r"distill.training.epoch: no such key"):
        chosen(photos, "distill.training.epoch=3")


def test_image_sizes_are_whole_patches_of_all_networks(tmp_path: Path) -> None:
    for i in range(24):
        (tmp_path / "photos" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / "ab"[i % 2] / f"{i}.jpg").write_bytes(image_bytes(i, size=(130, 90)))
    options = {"students": "vit_tiny_patch16_224", "teacher": "vit_small_patch14_dinov2"}
    assert chosen(tmp_path / "photos", **options).data.image_size == 112
    assert chosen(tmp_path / "photos").data.image_size == 96


def test_a_teacher_is_a_model_or_a_file_called_like_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = make_folder(tmp_path / "photos", counts={"cat": 12, "dog": 12})
    published = chosen(photos, teacher="resnet18").teachers["teacher"]
    assert (published.model.pretrained, published.objectives) == (True, ())
    for name in ("resnet10t.safetensors", "mine.safetensors"):
        (tmp_path / name).write_bytes(b"")
    local = chosen(photos, teacher=str(tmp_path / "resnet10t.safetensors")).teachers["teacher"]
    assert (local.model.name, local.weights) == ("resnet10t", str(tmp_path / "resnet10t.safetensors"))
    with pytest.raises(UserError, match="'mine' is no timm model, so its architecture is not known"):
        chosen(photos, teacher=str(tmp_path / "mine.safetensors"))
    for name in ("resnet81", "resnet18.foo"):
        with pytest.raises(UserError, match=rf"--teacher {name}: neither a timm model.* nor a file of weights"):
            chosen(photos, teacher=name)
    monkeypatch.chdir(tmp_path)
    assert chosen(photos, teacher="resnet10t.safetensors").teachers["teacher"].weights == "resnet10t.safetensors"


def test_a_column_is_taken_by_the_first_of_its_names_and_others_are_named(tmp_path: Path) -> None:
    make_folder(tmp_path, counts={"images": 60})
    rows = [f"{i},images/{i:03d}.jpg,a{i % 3},b" for i in range(60)]
    (tmp_path / "two.csv").write_text("\n".join(["image,filename,label,target", *rows]))
    source = chosen(tmp_path / "two.csv").data.source
    assert source is not None
    assert (source.model_dump()["path_column"], source.model_dump()["label_column"]) == ("filename", "label")
    (tmp_path / "odd.csv").write_text("\n".join(["age,path,tumour_grade,centre", *rows]))
    _, text = chosen_settings(str(tmp_path / "odd.csv"))
    assert "(else data.source.label_column=NAME): nothing is measured" in text
    assert "by its name, among age, centre, path, tumour_grade" in text
    graded = chosen(tmp_path / "odd.csv", "data.source.label_column=tumour_grade")
    assert graded.data.val == "val"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("photo.jpg", "is a file: give a folder of images"),
        ("photos.zip", "is a file: give a folder of images"),
        ("gone.csv", "40 of 40 files do not exist, such as .*a/0.jpg: paths are relative to the table .*gone.csv"),
        ("one", "all labelled images are of one class, cat: add a second class"),
    ],
)
def test_a_source_that_cannot_be_trained_on_is_refused(name: str, told: str, tmp_path: Path) -> None:
    make_folder(tmp_path / "one", counts={"cat": 12})
    (tmp_path / "photo.jpg").write_bytes(image_bytes(0))
    (tmp_path / "photos.zip").write_bytes(b"PK")
    (tmp_path / "gone.csv").write_text("path,label\n" + "\n".join(f"a/{i}.jpg,{i % 2}" for i in range(40)))
    with pytest.raises(UserError, match=told):
        chosen(tmp_path / name)


def test_an_equals_sign_in_a_folder_is_no_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "my=photos", counts={"cat": 12, "dog": 12})
    assert cli.main(["plan", "--fast", "my=photos"]) == 0


def test_images_that_changed_since_they_were_packed_are_refused(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    photos = make_folder(tmp_path / "photos", counts={"cat": 8, "dog": 8})
    assert cli.main(["pack", "photos"]) == 0
    assert cli.main(["plan", "--fast", "photos"]) == 0
    (photos / "cat" / "000.jpg").rename(photos / "dog" / "moved.jpg")
    assert cli.main(["pretrain", "photos"]) == 2
    assert "photos has changed since runs/photos/shards was packed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "no images: give a folder or a table"),
        (["photos", "more"], "photos more: give one folder or table of images"),
        (["--config", "a.yaml", "photos", "--teacher", "auto"], "photos --teacher: with --config, give settings as"),
        (["missing"], "missing does not exist"),
        ([".", "data={image_size: 32}"], "data={…} replaces data.source: give the keys of data one by one"),
    ],
)
def test_a_call_without_images_or_with_too_many_words_is_refused(words, told, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["pretrain", *words]) == pretrain.main(words) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_python_takes_few_labels_to_an_exported_student(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = make_folder(tmp_path / "photos", counts={"cat": 6, "dog": 6, "unlabelled": 20})
    settings = dict(line.split("=") for line in (*SHORT, *OWN_TEACHER)) | {"launcher.threads": 1}
    fitted = dpkd.fit(photos, out=tmp_path / "run", settings=settings)
    assert "labelled images of val" in capsys.readouterr().out
    scores = fitted.summary["students"]["resnet10t"]["scores"]["val"]["known_classes"]
    assert 0 <= scores["mean"] <= 1
    assert scores["ci95"] > 0.1  # of few images
    assert "labels in the median class" in (fitted.folder / "chosen.yaml").read_text()
    model = timm.create_model(f"local-dir:{fitted.exports['resnet10t']}", pretrained=True)
    assert model.num_classes == 2
    with pytest.raises(UserError, match="began with other settings"):
        dpkd.fit(photos, out=tmp_path / "run", settings=settings | {"distill.training.batch_size": 4})


def test_images_without_labels_end_as_an_exported_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "photos", counts={"": 24})
    assert pretrain.main(["photos", *SHORT, *OWN_TEACHER]) == 0
    assert timm.create_model("local-dir:runs/photos/export/resnet10t", pretrained=True).num_classes == 0
    assert json.loads((tmp_path / "runs/photos/summary.json").read_text())["exports"]


def test_a_file_of_weights_teaches_students(tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "photos", counts={"cat": 10, "dog": 10})
    teacher = str(shared_data / "tf_efficientnet_lite0.safetensors")
    assert cli.main(["pretrain", "photos", "--students", "resnet10t", "--teacher", teacher, *SHORT]) == 0
    summary = json.loads((tmp_path / "runs/photos/summary.json").read_text())
    assert "known_classes" in summary["students"]["resnet10t"]["over_baseline"]["val"]
    assert "known_classes" not in summary["teachers"]["teacher"]["scores"]["val"]
