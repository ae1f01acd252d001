import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from dpkd.data import sources
from dpkd.data.settings import FolderSource, ShardSource, TableSource
from dpkd.errors import UserError
from tests.data.packing import SerialPool, image_bytes, make_folder, make_tar, mask_bytes, pack_at, reasons, tar_sample


def find(source):
    return sources.find(source, pool=SerialPool())


def places(found) -> dict[str, tuple[str | None, str | None]]:
    return {record.name: (record.split, record.class_name) for record in found.records}


@pytest.mark.parametrize(
    ("folders", "place"),
    [
        ({"train/cat": 1, "test/cat": 1}, {"train/cat/000.jpg": ("train", "cat"), "test/cat/000.jpg": ("test", "cat")}),
        ({"cat": 1, "dog": 1}, {"cat/000.jpg": (None, "cat"), "dog/000.jpg": (None, "dog")}),
        ({"train": 1, "val": 1}, {"train/000.jpg": ("train", None), "val/000.jpg": ("val", None)}),
        ({".": 2}, {"000.jpg": (None, None), "001.jpg": (None, None)}),
        ({"a/cat/x": 1, "a/unlabelled": 1}, {"a/cat/x/000.jpg": ("a", "cat"), "a/unlabelled/000.jpg": ("a", None)}),
    ],
)
def test_the_depth_of_folders_tells_split_and_class(folders, place, tmp_path):
    assert places(find(FolderSource(path=str(make_folder(tmp_path, counts=folders))))) == place


def test_masks_and_expert_maps_belong_to_their_image_and_other_files_stay_out(tmp_path):
    make_folder(tmp_path, counts={"cat": 2}, masks=True)
    for name in ("000.expert-nucleus.png", "000.instances.png", "lost.mask.png", "001.v2.png"):
        (tmp_path / "cat" / name).write_bytes(mask_bytes())
    (tmp_path / "cat" / "notes.txt").write_text("x")
    (tmp_path / "cat" / "._000.jpg").write_text("x")
    found = find(FolderSource(path=str(tmp_path)))
    assert [record.name for record in found.records] == ["cat/000.jpg", "cat/001.jpg", "cat/001.v2.png"]
    given = found.records[0].given
    assert set(given) == {"mask.png", "expert-nucleus.png"}
    assert given["mask.png"].url.endswith("cat/000.mask.png")
    assert found.bad == (("cat/lost.mask.png", "a mask file without its image cat/lost.*"),)


def test_empty_and_missing_folders_and_mixed_depths_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"data.source.path=.*has no image"):
        find(FolderSource(path=str(tmp_path)))
    with pytest.raises(UserError, match=r"data.source.path=.*does not exist"):
        find(FolderSource(path=str(tmp_path / "absent")))
    make_folder(tmp_path, counts={"cat": 1, "train/dog": 1})
    with pytest.raises(UserError, match=r"different depths, such as cat/000.jpg and train/dog/000.jpg"):
        find(FolderSource(path=str(tmp_path)))


ROWS = [
    {"file": "cat/000.jpg", "label": "cat", "split": "train", "patient": "p1", "mask": "cat/000.mask.png", "age": 4},
    {"file": "cat/001.jpg", "label": None, "split": "test", "patient": None, "mask": None, "age": None},
]
COLUMNS: dict[str, Any] = {
    "path_column": "file",
    "label_column": "label",
    "split_column": "split",
    "group_column": "patient",
}
MORE: dict[str, Any] = {"mask_column": "mask", "attribute_columns": ("age",)}


def write_table(path, rows) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        comma = "\t" if path.suffix == ".tsv" else ","
        lines = [rows[0].keys(), *(["" if cell is None else cell for cell in row.values()] for row in rows)]
        path.write_text("".join(comma.join(map(str, line)) + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_tables_of_every_kind_say_the_same(suffix, tmp_path):
    make_folder(tmp_path, counts={"cat": 2}, masks=True)
    found = find(TableSource(path=write_table(tmp_path / f"t{suffix}", ROWS), **COLUMNS, **MORE))
    assert found.bad == ()
    first, second = found.records
    assert (first.name, first.class_name, first.split, first.group) == ("cat/000.jpg", "cat", "train", "p1")
    assert first.given["mask.png"].read() == mask_bytes()
    assert str(first.attributes["age"]) == "4"
    assert (second.class_name, second.split, second.group, second.given) == (None, "test", None, {})


def test_rows_that_cannot_be_used_are_named_with_their_reason(tmp_path):
    rows = [
        {"path": "a.jpg", "label": 0},
        {"path": "b.jpg", "label": -7},
        {"path": "c.jpg", "label": 1.5},
        {"path": "", "label": 1},
        {"path": "a.jpg", "label": 1},
        {"path": "d.jpg", "label": -1},
    ]
    path = write_table(tmp_path / "t.jsonl", rows)
    with Path(path).open("a") as file:
        file.write('{"path": "e.jp\n[1]\n')
    found = find(TableSource(path=path, label_column="label"))
    assert {record.name: record.class_name for record in found.records} == {"a.jpg": "0", "d.jpg": None}
    wrong = [reason for _, reason in found.bad]
    for item, words in zip(
        wrong,
        ["-7 is out of range", "1.5 is neither", "is empty", "an earlier row", "not JSON", "not a JSON object"],
        strict=True,
    ):
        assert words in item
    assert found.bad[0][0].endswith("row 2 (b.jpg)")


def test_tables_that_cannot_be_read_are_refused(tmp_path):
    path = write_table(tmp_path / "t.csv", [{"path": "a.jpg", "label": 0}])
    with pytest.raises(
        UserError,
        match=r"label_column='lable' is not a column of .* \(did you mean 'label'\?\); its columns are: label, path",
    ):
        find(TableSource(path=path, label_column="lable"))
    for name, content, message in (
        ("x.xlsx", b"", "is not a table: give a .csv"),
        ("x.parquet", b"junk", "cannot be read as .parquet"),
        ("x.csv", b"path\n", "has no rows"),
        ("y.csv", b"path\n\xff\xfe\xfa\n", "cannot be read as .csv"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            find(TableSource(path=str(tmp_path / name)))
    with pytest.raises(UserError, match="does not exist"):
        find(TableSource(path=str(tmp_path / "absent.csv")))


def test_a_table_with_images_inside_is_refused_in_one_line(tmp_path):
    table = pa.table({"image": [{"bytes": image_bytes(i), "path": None} for i in range(3)], "label": [0, 1, 2]})
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"path_column='image' .* has images or lists, not paths") as caught:
        find(TableSource(path=str(tmp_path / "t.parquet"), path_column="image"))
    assert len(str(caught.value)) < 400


def test_shards_of_others_are_read_by_folder_and_by_braces(tmp_path):
    for i, split in enumerate(["train", "train", "test"]):
        make_tar(
            tmp_path / f"{split}-{i:04d}.tar",
            {f"{split}{i}_{k}": {"jpg": image_bytes(k), "cls": str(k).encode(), "txt": b"no"} for k in range(2)},
        )
    by_folder = find(ShardSource(path=str(tmp_path)))
    assert places(by_folder)["train0_1.jpg"] == ("train", "1")
    assert len(by_folder.records) == 6
    by_braces = find(ShardSource(path=str(tmp_path / "train-{0000..0001}.tar")))
    assert [record.name for record in by_braces.records] == [f"train{i}_{k}.jpg" for i in range(2) for k in range(2)]
    assert [r.name for r in find(ShardSource(path=str(tmp_path / "test-*.tar"))).records] == [
        "test2_0.jpg",
        "test2_1.jpg",
    ]
    missing = find(ShardSource(path=str(tmp_path / "train-{0000..0002}.tar")))
    assert missing.bad == (("train-0002.tar", "the tar does not exist"),)


def test_a_cut_tar_never_mixes_its_last_sample_with_the_next_tar(tmp_path):
    first = make_tar(
        tmp_path / "t-0.tar", {key: tar_sample(i, class_name="one") for i, key in enumerate(["a", "b", "c"])}
    )
    make_tar(tmp_path / "t-1.tar", {key: tar_sample(9 + i, class_name="two") for i, key in enumerate(["c", "d"])})
    whole = first.read_bytes()
    position = whole.index(b"c.json")
    for cut in (position, position + 512, position - 100):  # before, after and without the header of the last member
        first.write_bytes(whole[:cut])
        found = find(ShardSource(path=str(tmp_path)))
        assert places(found) == {
            "a.jpg": ("t", "one"),
            "b.jpg": ("t", "one"),
            "c.jpg": ("t", "two"),
            "d.jpg": ("t", "two"),
        } or (cut == position - 100 and set(places(found)) == {"a.jpg", "c.jpg", "d.jpg"})
        assert all(record.image.url.endswith("t-1.tar") for record in found.records if record.class_name == "two")
        assert found.bad[0][0] == "t-0.tar"
        assert "cut short" in found.bad[0][1]
        assert "last sample of a truncated tar" in found.bad[1][1]


def test_a_key_that_two_tars_use_means_two_samples(tmp_path):
    for i in range(2):
        make_tar(tmp_path / f"t-{i}.tar", {"000": tar_sample(i, label=i)})
    found = find(ShardSource(path=str(tmp_path)))
    assert [record.name for record in found.records] == ["t-0/000.jpg", "t-1/000.jpg"]


def test_members_that_cannot_be_used_are_named(tmp_path):
    samples = {
        "a": tar_sample(0, label=0),
        "b": {"jpg": image_bytes(1), "json": b"{"},
        "c": {"json": b"{}"},
        "d": {"jpg": image_bytes(1), "json": b"[]"},
        "e": {"jpg": image_bytes(1), "json": json.dumps({"label": -5}).encode()},
    }
    make_tar(tmp_path / "t.tar", samples)
    found = find(ShardSource(path=str(tmp_path / "t.tar")))
    assert [record.name for record in found.records] == ["a.jpg"]
    assert [item for item, _ in found.bad] == ["t.tar/b", "t.tar/c", "t.tar/d", "t.tar/e"]
    assert "out of range" in found.bad[-1][1]


def test_labels_out_of_the_range_of_a_data_set_are_named(tmp_path):
    make_folder(tmp_path / "images", counts={"train/cat": 2, "train/dog": 1})
    pack_at(tmp_path / "images", tmp_path / "set")
    tar = next((tmp_path / "set").glob("*.tar"))
    content = tar.read_bytes()
    tar.write_bytes(content.replace(b'"label": 1', b'"label": 7', 1).replace(b'"label": 0', b'"label": 1', 1))
    found = find(ShardSource(path=str(tmp_path / "set")))
    assert len(found.records) == 1
    assert sorted(reason for _, reason in found.bad) == [
        "label 1 means class 'dog', and the class name is 'cat'",
        "label 7 is out of range: the data set has 2 classes, numbered from 0",
    ]


def test_compressed_and_absent_tars_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no \.tar"):
        find(ShardSource(path=str(tmp_path)))
    (tmp_path / "x.tar.gz").write_bytes(b"x")
    with pytest.raises(UserError, match=r"compressed tars, such as x\.tar\.gz"):
        find(ShardSource(path=str(tmp_path)))


def recurring_key(folder: Path) -> Path:
    """A tar that was cut within the image of its last sample `b`, after its json, and a tar that begins with a `b`."""
    samples = {key: dict(reversed(tar_sample(i, label=i).items())) for i, key in enumerate("ab")}
    cut = make_tar(folder / "t-0.tar", samples)
    whole = cut.read_bytes()
    cut.write_bytes(whole[: whole.index(b"b.jpg") + 600])
    make_tar(folder / "t-1.tar", {"b": {"jpg": image_bytes(9), "cls": b"9"}})
    return folder


def test_webdataset_joins_halves_of_two_samples_where_a_key_recurs_after_a_cut(tmp_path):
    """Of webdataset 1.0.2 with a handler that goes on: the label of the cut tar, the image of the next, no warning.

    A release where this fails has mended it; what is read here does not depend on it.
    """
    urls = [str(path) for path in sorted(recurring_key(tmp_path).glob("*.tar"))]
    mixed = list(webdataset.WebDataset(urls, shardshuffle=False, handler=webdataset.ignore_and_continue))[-1]
    assert (mixed["__key__"], mixed["json"], mixed["jpg"]) == ("b", b'{"label": 1}', image_bytes(9))


def test_a_key_that_recurs_after_a_cut_is_another_sample_and_the_lost_sample_is_named(tmp_path):
    source = ShardSource(path=str(recurring_key(tmp_path / "tars")))
    found = find(source)
    assert {record.name: record.class_name for record in found.records} == {"a.jpg": "0", "b.jpg": "9"}
    assert [item for item, _ in found.bad] == ["t-0.tar", "t-0.tar/b"]
    split = pack_at(source, tmp_path / "set").split("t")
    samples = {sample.key: (sample.meta["class_name"], sample.image) for sample in map(split.read, range(2))}
    assert samples == {"a": ("0", image_bytes(0)), "b": ("9", image_bytes(9))}
    assert sorted(reasons(tmp_path / "set")) == ["t-0.tar", "t-0.tar/b"]
