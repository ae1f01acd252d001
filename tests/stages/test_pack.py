import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile

from dpkd.backends.local_pool import LocalPool
from dpkd.data.images import decode_image
from dpkd.data.settings import ClassSplits, FileSplits, FractionSplits, ShardSource, TableSource
from dpkd.data.shards import Dataset
from dpkd.errors import StorageError, UserError
from tests.data.packing import (
    SerialPool,
    files_of,
    image_bytes,
    make_folder,
    make_tar,
    mask_bytes,
    pack_at,
    reasons,
    tar_sample,
)
from tests.test_storage import no_file_above, no_permission

COUNTS = {"train/cat": 9, "train/dog": 6, "test/cat": 3}


class Killed(Exception):
    """Stands for the death of the process that packs."""


class DyingPool(SerialPool):
    """Dies after some items."""

    def __init__(self, num_items: int) -> None:
        super().__init__()
        self.num_items = num_items

    def map(self, function, items):
        for done, answer in enumerate(super().map(function, items)):
            if done == self.num_items:
                raise Killed
            yield answer


@pytest.fixture
def images(tmp_path) -> Path:
    return make_folder(tmp_path / "images", counts=COUNTS, masks=True)


def test_the_bytes_do_not_depend_on_workers_their_order_or_the_place(images, tmp_path):
    expected = files_of(Path(pack_at(images, tmp_path / "one").url))
    assert files_of(Path(pack_at(images, tmp_path / "two", pool=LocalPool(2)).url)) == expected
    assert files_of(Path(pack_at(images, tmp_path / "three", pool=SerialPool(last_first=True)).url)) == expected
    images.rename(tmp_path / "elsewhere")
    for path in (tmp_path / "elsewhere").rglob("*"):
        os.utime(path, (1, 1))
    assert files_of(Path(pack_at(tmp_path / "elsewhere", tmp_path / "four").url)) == expected


@pytest.mark.parametrize("num_items", range(5))
def test_a_pack_that_dies_is_continued_and_keeps_what_was_finished(num_items, images, tmp_path):
    expected = files_of(Path(pack_at(images, tmp_path / "unbroken").url))
    place = tmp_path / "broken"
    with pytest.raises(Killed):
        pack_at(images, place, pool=DyingPool(num_items))
    assert not (place / "dataset.json").exists()
    with pytest.raises(UserError, match="missing"):
        Dataset.open(str(place))
    finished = {path: path.stat().st_mtime_ns for path in place.glob("*.tar")}
    (place / ".tmp-123-train-000000.tar").write_bytes(b"half")
    pack_at(images, place)
    assert files_of(place) == expected
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


@pytest.mark.nightly
@pytest.mark.slow
def test_a_pack_killed_with_its_workers_at_any_moment_ends_in_the_same_bytes(tmp_path):
    make_folder(tmp_path / "images", counts={"train/a": 150, "train/b": 150})
    expected = files_of(Path(pack_at(tmp_path / "images", tmp_path / "unbroken", samples_per_shard=10).url))
    place = tmp_path / "killed"
    code = (
        "import sys; from pathlib import Path\n"
        "from dpkd.backends.local_pool import LocalPool; from tests.data.packing import pack_at\n"
        "if __name__ == '__main__':\n"
        "    pack_at(Path(sys.argv[1]), Path(sys.argv[2]), pool=LocalPool(2), samples_per_shard=10)\n"
    )
    script = tmp_path / "run.py"
    script.write_text(code)
    command = [sys.executable, str(script), str(tmp_path / "images"), str(place)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    for num_shards in (1, 12):
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        deadline = time.monotonic() + 60
        while len(list(place.glob("*.tar"))) < num_shards and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    pack_at(tmp_path / "images", place, samples_per_shard=10)
    assert files_of(place) == expected


def test_packing_again_changes_nothing_and_mends_a_damaged_shard(images, tmp_path):
    place = tmp_path / "set"
    manifest = pack_at(images, place).manifest
    expected = files_of(place)
    times = {path: path.stat().st_mtime_ns for path in place.glob("*.tar")}
    pack_at(images, place)
    assert {path: path.stat().st_mtime_ns for path in place.glob("*.tar")} == times
    damaged = place / "train-000001.tar"
    content = bytearray(damaged.read_bytes())
    content[700] ^= 1
    damaged.write_bytes(bytes(content))
    assert pack_at(images, place).manifest == manifest
    assert files_of(place) == expected


def test_settings_that_contradict_the_packed_set_are_refused_with_the_difference(images, tmp_path):
    pack_at(images, tmp_path / "set")
    before = files_of(tmp_path / "set")
    with pytest.raises(UserError, match=r"from something else: data.samples_per_shard was 4 and is 5\. Choose another"):
        pack_at(images, tmp_path / "set", samples_per_shard=5)
    with pytest.raises(UserError, match=r"run.seed was 0 and is 1"):
        pack_at(images, tmp_path / "set", seed=1)
    (images / "train" / "cat" / "new.jpg").write_bytes(image_bytes(77))
    with pytest.raises(UserError, match=r"data.source was folder, 18 samples, \w+ and is folder, 19"):
        pack_at(images, tmp_path / "set")
    assert files_of(tmp_path / "set") == before


def test_shards_of_an_unfinished_attempt_with_other_settings_do_not_stay(images, tmp_path):
    with pytest.raises(Killed):
        pack_at(images, tmp_path / "set", pool=DyingPool(4), samples_per_shard=2)
    pack_at(images, tmp_path / "set", samples_per_shard=8)
    assert files_of(tmp_path / "set") == files_of(Path(pack_at(images, tmp_path / "fresh", samples_per_shard=8).url))


def test_somebody_elses_tars_and_the_source_itself_are_never_touched(tmp_path):
    make_tar(tmp_path / "tars" / "t-0.tar", {"a": tar_sample(0)})
    before = files_of(tmp_path / "tars")
    make_folder(tmp_path / "images", counts={"cat": 2})
    with pytest.raises(UserError, match=r"holds tars without a dataset\.json"):
        pack_at(tmp_path / "images", tmp_path / "tars")
    with pytest.raises(UserError, match="is the source itself"):
        pack_at(ShardSource(path=str(tmp_path / "tars")), tmp_path / "tars")
    assert files_of(tmp_path / "tars") == before


def test_what_cannot_be_used_is_reported_by_name_and_the_rest_is_packed(images, tmp_path):
    cat = images / "train" / "cat"
    (cat / "000.jpg").write_bytes(b"")
    (cat / "001.jpg").write_bytes(image_bytes(1)[:-300])
    (cat / "002.jpg").write_bytes(b"<html>404</html>")
    (cat / "003.mask.png").write_bytes(mask_bytes(size=(16, 20)))
    (cat / "004.mask.png").write_bytes(b"no png")
    dataset = pack_at(images, tmp_path / "set")
    found = reasons(tmp_path / "set")
    assert sorted(found) == [f"train/cat/00{i}.jpg" for i in range(5)]
    assert found["train/cat/000.jpg"] == "the file is empty"
    assert found["train/cat/001.jpg"] == "the jpg is cut short"
    assert found["train/cat/003.jpg"] == "mask: the mask is 16x20, and the image is 20x16"
    assert found["train/cat/004.jpg"].startswith("mask: ")
    assert dataset.split("train").num_samples + dataset.split("test").num_samples == 18 - 5
    (tmp_path / "set.quarantine.jsonl").unlink()
    pack_at(images, tmp_path / "set")
    assert reasons(tmp_path / "set") == found


def test_more_bad_samples_than_allowed_stop_the_run_and_mending_them_continues_it(images, tmp_path):
    good = (images / "train" / "cat" / "000.jpg").read_bytes()
    (images / "train" / "cat" / "000.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"1 of 18 samples .*data.bad_limit=0.05.*train/cat/000.jpg: the file is empty"):
        pack_at(images, tmp_path / "set", limit=0.05)
    assert not (tmp_path / "set" / "dataset.json").exists()
    (images / "train" / "cat" / "000.jpg").write_bytes(good)
    pack_at(images, tmp_path / "set", limit=0.05)
    assert reasons(tmp_path / "set") == {}


def test_a_split_of_which_nothing_can_be_used_is_refused(images, tmp_path):
    for path in (images / "test").rglob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"not one sample of the split 'test' can be used"):
        pack_at(images, tmp_path / "set", limit=1)


def test_a_full_disk_is_reported_and_the_next_run_continues(images, tmp_path):
    place = tmp_path / "set"
    pack_at(images, tmp_path / "expected")
    limit = max(path.stat().st_size for path in (tmp_path / "expected").glob("*.tar")) - 1
    with (
        pytest.raises(StorageError, match=r"cannot write .*set/train-00000\d.tar: File too large") as caught,
        no_file_above(limit),
    ):
        pack_at(images, place)
    assert caught.type is StorageError
    for path in place.iterdir():  # what stands is whole
        assert path.name == "packing.json" or path.read_bytes() == (tmp_path / "expected" / path.name).read_bytes()
    pack_at(images, place)
    assert files_of(place) == files_of(tmp_path / "expected")


def test_a_worker_process_reports_a_full_disk_too(images, tmp_path):
    with no_file_above(1000), pytest.raises(StorageError, match=r"cannot write .*\.tar: File too large"):
        pack_at(images, tmp_path / "set", pool=LocalPool(1))
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["packing.json"]


def test_no_write_permission_is_reported_before_any_work():
    with tempfile.TemporaryDirectory() as name:  # pytest's own folder is closed to the other user that we become
        place = Path(name) / "set"
        place.mkdir()
        Path(name).chmod(0o755)
        images = make_folder(Path(name) / "images", counts=COUNTS)
        with (
            pytest.raises(StorageError, match=r"cannot write .*set/packing.json: .*no permission"),
            no_permission(place),
        ):
            pack_at(images, place)
        assert not list(place.iterdir())


def test_one_class_only_is_packed(tmp_path):
    make_folder(tmp_path / "images", counts={"only": 5})
    manifest = pack_at(tmp_path / "images", tmp_path / "set").manifest
    assert manifest.classes == ("only",)
    assert manifest.splits["train"].class_counts == (5,)


def test_a_flat_folder_is_packed_without_labels(tmp_path):
    make_folder(tmp_path / "images", counts={".": 5})
    manifest = pack_at(tmp_path / "images", tmp_path / "set").manifest
    assert manifest.classes == ()
    assert manifest.splits["train"].num_unlabelled == 5


def test_an_empty_folder_stops_before_anything_is_written(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match="has no image"):
        pack_at(tmp_path / "images", tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_groups_by_pattern_are_never_cut_and_samples_without_one_are_reported(tmp_path):
    folder = tmp_path / "images" / "sign"
    folder.mkdir(parents=True)
    for track in range(8):
        for frame in range(3):
            (folder / f"{track:05d}_{frame:05d}.jpg").write_bytes(image_bytes(10 * track + frame))
    (folder / "odd.jpg").write_bytes(image_bytes(999))
    dataset = pack_at(
        tmp_path / "images",
        tmp_path / "set",
        splits=FractionSplits(fractions={"train": 0.5, "test": 0.5}),
        group_pattern=r"(\d+)_\d+\.jpg$",
    )
    splits = (dataset.split(name) for name in ("train", "test"))
    train, test = ({split.read(i).meta["group"] for i in range(split.num_samples)} for split in splits)
    assert len(train) == len(test) == 4
    assert not train & test
    assert list(reasons(tmp_path / "set")) == ["sign/odd.jpg"]


def test_splits_by_class_and_by_file(tmp_path):
    make_folder(tmp_path / "images", counts={"cat": 3, "dog": 3, "owl": 3})
    classes = ClassSplits(classes={"base": ("cat",), "novel": 1})
    manifest = pack_at(tmp_path / "images", tmp_path / "a", splits=classes, train="base").manifest
    assert {name: split.num_samples for name, split in manifest.splits.items()} == {"base": 3, "novel": 3}
    assert manifest.num_left_out == 3
    assert len(manifest.classes) == 2
    (tmp_path / "train.txt").write_text("cat/000.jpg\ndog/001\n\nabsent.jpg\n")
    dataset = pack_at(
        tmp_path / "images", tmp_path / "b", splits=FileSplits(files={"train": str(tmp_path / "train.txt")})
    )
    assert sorted(dataset.split("train").keys) == ["cat/000", "dog/001"]
    assert "absent.jpg" in reasons(tmp_path / "b")
    with pytest.raises(UserError, match=r"data.splits.files.train=.*cannot be read"):
        pack_at(tmp_path / "images", tmp_path / "c", splits=FileSplits(files={"train": str(tmp_path / "absent.txt")}))


def test_a_table_with_missing_files_and_attributes(tmp_path):
    make_folder(tmp_path / "images", counts={"x": 2})
    (tmp_path / "t.csv").write_text(
        "path,label,age\nimages/x/000.jpg,cat,4\nimages/x/001.jpg,,\nimages/x/lost.jpg,cat,\n"
    )
    source = TableSource(path=str(tmp_path / "t.csv"), label_column="label", attribute_columns=("age",))
    split = pack_at(source, tmp_path / "set").split("train")
    meta = {sample.key: sample.meta for sample in split.read_shard(0)}
    assert meta["images/x/000"]["attributes"] == {"age": "4"}
    assert meta["images/x/001"]["label"] is None
    assert reasons(tmp_path / "set") == {"images/x/lost.jpg": "the file cannot be read: No such file or directory"}


def test_a_packed_set_packed_again_keeps_samples_labels_and_classes(images, tmp_path):
    first = pack_at(images, tmp_path / "first")
    second = pack_at(ShardSource(path=first.url), tmp_path / "second", samples_per_shard=5)
    assert second.manifest.classes == first.manifest.classes
    for name in ("train", "test"):
        one, two = first.split(name), second.split(name)
        assert two.keys == one.keys
        assert two.label_N.tolist() == one.label_N.tolist()
        assert two.read(1).image == one.read(1).image
        assert two.read(1).given == one.read(1).given


def test_a_cut_tar_as_source_is_reported_and_its_whole_samples_are_packed(tmp_path):
    first = make_tar(tmp_path / "tars" / "t-0.tar", {k: tar_sample(i, class_name="one") for i, k in enumerate("abcde")})
    make_tar(tmp_path / "tars" / "t-1.tar", {k: tar_sample(9 + i, class_name="two") for i, k in enumerate("efghi")})
    whole = first.read_bytes()
    first.write_bytes(whole[: whole.index(b"e.json") + 512])
    split = pack_at(ShardSource(path=str(tmp_path / "tars")), tmp_path / "set").split("t")
    assert {s.key: s.meta["class_name"] for k in range(3) for s in split.read_shard(k)} == {
        **dict.fromkeys("abcd", "one"),
        **dict.fromkeys("efghi", "two"),
    }
    assert split.read(split.keys.index("e")).image == image_bytes(9)
    assert sorted(reasons(tmp_path / "set")) == ["t-0.tar", "t-0.tar/e"]


def test_split_names_that_cannot_name_a_file_are_refused(tmp_path):
    make_folder(tmp_path / "images", counts={"x": 1})
    (tmp_path / "t.csv").write_text("path,part\nimages/x/000.jpg,../up\n")
    with pytest.raises(UserError, match=r"split '../up' cannot name a file"):
        pack_at(TableSource(path=str(tmp_path / "t.csv"), split_column="part"), tmp_path / "set")


def test_shards_whose_manifest_is_damaged_or_lost_are_not_touched(images, tmp_path):
    pack_at(images, tmp_path / "set", samples_per_shard=2)
    place = tmp_path / "set" / "dataset.json"
    for damage, words in (
        (lambda: place.write_bytes(place.read_bytes()[:50]), r"dataset\.json is not the manifest of a data set"),
        (place.unlink, r"tars without a dataset\.json, such as .*\.tar"),
    ):
        damage()
        before = files_of(tmp_path / "set")
        with pytest.raises(UserError, match=words):
            pack_at(images, tmp_path / "set", samples_per_shard=2)
        assert files_of(tmp_path / "set") == before


def test_the_log_has_how_the_source_was_understood_and_what_was_ignored(tmp_path, capsys):
    images = make_folder(tmp_path / "images", counts={"train/cat": 3, "train/dog": 2, "train/nan": 1, "test/cat": 1})
    for name in ("a.gif", "b.gif", "c.heic", "notes"):
        (images / "train" / "cat" / name).write_bytes(b"x")
    (images / "train" / "cat" / "d.jfif").write_bytes(image_bytes(50))
    for folder in ("train/@eaDir", "__MACOSX/train/cat", "train/.ipynb_checkpoints", "train/#recycle"):
        (images / folder).mkdir(parents=True)
        (images / folder / "x.jpg").write_bytes(image_bytes(51))
    for folder in ("train/bird", "train/fish", "train/.hidden"):
        (images / folder).mkdir()
    (images / "train" / "fish" / "e.gif").write_bytes(b"x")
    pack_at(images, tmp_path / "set")
    lines = capsys.readouterr().out.splitlines()
    assert [line.removeprefix("pack: ") for line in lines] == [
        "the folders are <split>/<class>/*, without a label in nan, no image in train/bird, train/fish",
        "2 classes: cat, dog",
        "split test: 1 samples, 1 labelled in 1 classes, 0 without a label",
        "split train: 7 samples, 6 labelled in 2 classes, 1 without a label",
        "ignored 3 .gif, 1 .heic, 1 in #recycle, 1 in @eaDir, 1 in __MACOSX, 1 without a suffix",
    ]


def test_the_log_names_which_members_of_tars_were_ignored(tmp_path, capsys):
    sample = {"jpg": image_bytes(0), "cls": b"3", "txt": b"a caption", "npy": b"x"}
    make_tar(tmp_path / "tars" / "train-0.tar", {"a": sample, "b": sample, "__MACOSX/c": sample, "._a": {"jpg": b"x"}})
    pack_at(ShardSource(path=str(tmp_path / "tars")), tmp_path / "set")
    assert "pack: ignored 4 in __MACOSX, 2 .npy, 2 .txt, 1 .jpg" in capsys.readouterr().out


def test_folders_of_coco_are_splits_and_a_folder_of_other_pictures_is_refused_by_what_it_holds(tmp_path, capsys):
    make_folder(tmp_path / "coco", counts={"train2017": 3, "val2017": 2})
    manifest = pack_at(tmp_path / "coco", tmp_path / "set").manifest
    assert {name: split.num_samples for name, split in manifest.splits.items()} == {"train2017": 3, "val2017": 2}
    assert "pack: the folders are <split>/*, without labels" in capsys.readouterr().out
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone" / "a.HEIC").write_bytes(b"x")
    with pytest.raises(UserError, match=r"has no image .*, but 1 \.heic: give another folder"):
        pack_at(tmp_path / "phone", tmp_path / "other")


def test_a_window_decides_the_bytes_of_shards_and_is_named_in_the_log(tmp_path, capsys):
    folder = tmp_path / "ct" / "train"
    folder.mkdir(parents=True)
    values = np.linspace(-1000, 3000, 400).reshape(20, 20).astype(np.int16)
    tifffile.imwrite(folder / "a.tif", values)
    with pytest.raises(UserError, match=r"signed 16-bit values \(-1000 to 3000\).*set data\.window"):
        pack_at(tmp_path / "ct", tmp_path / "plain", limit=0.0)
    window = {"low": -200, "high": 300}
    dataset = pack_at(tmp_path / "ct", tmp_path / "set", window=window)
    assert "pack: values of more than 8 bits from -200 to 300 became 0 to 255" in capsys.readouterr().out
    expected = ((values.astype(float) + 200) / 500).clip(0, 1) * 255
    np.testing.assert_array_equal(decode_image(dataset.split("train").read(0).image)[..., 0], expected.round())
    with pytest.raises(UserError, match=r"data\.window was -200 to 300 and is None"):
        pack_at(tmp_path / "ct", tmp_path / "set")
    with pytest.raises(UserError, match=r"data\.window was -200 to 300 and is 0 to 300"):
        pack_at(tmp_path / "ct", tmp_path / "set", window={"low": 0, "high": 300})
