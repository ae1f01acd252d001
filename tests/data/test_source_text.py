"""One rule for labels, cells, lines and listed paths, whatever system wrote them."""

import datetime as dt
import decimal
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpkd.data import sources
from dpkd.data.labels import visible_labels
from dpkd.data.settings import FileSplits, FolderSource, ListedLabels, ShardSource, TableSource
from dpkd.data.text import cell_name, class_of_label, decode_text, match_lines, split_lines
from dpkd.errors import UserError
from tests.data.packing import SerialPool, image_bytes, make_folder, make_tar, pack_at, reasons

LABELS = [
    (3, "3"), (3.0, "3"), ("3", "3"), ("3.0", "3"), (" 3.00 ", "3"), ("003", "003"), ("003.0", "003"), ("3.", "3"),
    (1e16, "10000000000000000"), (decimal.Decimal("4.00"), "4"), (b"cat", "cat"), ("cat", "cat"), (" cat\n", "cat"),
    ("v1.5", "v1.5"), ("no", "no"), ("none", "none"), (True, "True"), (0, "0"), (-0.0, "0"), ("-0.0", "0"),
    (-1, None), (-1.0, None), ("-1", None), ("-1.0", None), (None, None), (float("nan"), None), ("", None), (" ", None),
    ("nan", None), ("NaN", None), ("None", None), ("null", None), ("NULL", None), ("NA", None), ("N/A", None),
    ("<NA>", None), ("#N/A", None), (b"nan", None),
]  # fmt: skip


@pytest.mark.parametrize(("cell", "name"), LABELS)
def test_a_label_means_one_class_however_it_is_written(cell, name):
    assert class_of_label(cell) == name


@pytest.mark.parametrize("cell", [-2, -7.0, "-3", "-2.0", 1.5, float("inf"), [1], {"a": 1}, "x" * 1001])
def test_what_is_no_label_is_refused(cell):
    with pytest.raises(ValueError, match=r"out of range|neither a name|1001 characters, more than 1000"):
        class_of_label(cell)


def test_names_and_texts_of_cells():
    assert [cell_name(cell) for cell in (12.0, "12.0", 12, " p1 ", "nan", None)] == ["12", "12", "12", "p1", None, None]
    assert [cell_name(cell) for cell in (" a b.jpg", "NaN")] == ["a b.jpg", None]
    assert cell_name(dt.date(2026, 1, 2)) == "2026-01-02"


@pytest.mark.parametrize(
    "data",
    ["a\nb c\n\nd\u2028e\n", "a\r\nb c\r\n\r\nd\u2028e", "\ufeffa\r\n  b c \nd\u2028e\n"],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_lines_end_at_line_feeds_alone_and_no_mark_becomes_part_of_them(data, encoding):
    plain = data.removeprefix("\ufeff") if encoding == "utf-16" else data
    assert split_lines(plain.encode(encoding)) == ["a", "b c", "d\u2028e"]
    assert decode_text(b"\xef\xbb\xbf{}") == "{}"
    with pytest.raises(UnicodeDecodeError):
        split_lines(b"caf\xe9\n")


NAMES = {"a/0.jpg": 0, "a/0": 0, "b/sub dir/1.png": 1, "b/sub dir/1": 1}


@pytest.mark.parametrize(
    "lines",
    [
        ["a/0.jpg", "b/sub dir/1.png"],
        ["./a/0.jpg", "././b/sub dir/1.png"],
        ["a\\0.jpg", ".\\b\\sub dir\\1.png"],
        ["a/0", "b/sub dir/1"],
        ["a/0.jpg 3", "b/sub dir/1.png\t4"],
        ["a/0.jpg,3", "b/sub dir/1.png, 4"],
        ["/data/x/images/a/0.jpg", "/data/x/images/b/sub dir/1.png"],
        ["images/a/0.jpg 0", "images/b/sub dir/1.png 1"],
        ["C:\\Users\\x\\a\\0.jpg", "C:\\Users\\x\\b\\sub dir\\1.png"],
    ],
)
def test_lists_of_other_systems_name_the_same_samples(lines):
    found = match_lines(lines, NAMES)
    assert (found.numbers, found.unknown) == (list(zip(lines, (0, 1), strict=True)), [])


def test_lines_that_would_need_two_prefixes_or_are_no_sample_are_unknown():
    assert match_lines(["x/a/0.jpg", "y/b/sub dir/1.png"], NAMES).unknown == ["x/a/0.jpg", "y/b/sub dir/1.png"]
    assert match_lines(["a/0.jpg", "a/1.jpg", "0.jpg"], NAMES).unknown == ["a/1.jpg", "0.jpg"]


def find(source):
    return sources.find(source, pool=SerialPool())


ROWS = [("a", 0.0, 12.0), ("b", float("nan"), None), ("c", -1.0, 12.0), ("d", 1.0, 7.0)]


def write_rows(path: Path) -> str:
    names = [f"im/x/{name}.jpg" for name, *_ in ROWS]
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"path": names, "label": [r[1] for r in ROWS], "patient": [r[2] for r in ROWS]}), path)
    elif path.suffix == ".jsonl":
        rows = [
            {"path": name, "label": label, "patient": patient, "text": "one\u2028\u2029\x85two"}
            for name, (_, label, patient) in zip(names, ROWS, strict=True)
        ]
        path.write_text("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8-sig")
    else:
        comma = "\t" if path.suffix == ".tsv" else ","
        lines = [comma.join(["path", "label", "patient"])]
        lines += [comma.join(map(str, (name, *row[1:]))) for name, row in zip(names, ROWS, strict=True)]
        path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    return str(path)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_labels_and_groups_that_pandas_wrote_are_the_same_in_every_table(suffix, tmp_path):
    source = TableSource(path=write_rows(tmp_path / f"t{suffix}"), label_column="label", group_column="patient")
    found = find(source)
    assert found.bad == ()
    assert [(r.class_name, r.group) for r in found.records] == [("0", "12"), (None, None), (None, "12"), ("1", "7")]


def test_binary_text_of_parquet_and_paths_of_windows_are_read(tmp_path):
    make_folder(tmp_path, counts={"cat": 2})
    table = pa.table({"path": [b"cat\\000.jpg", b"cat\\001.jpg"], "label": [b"cat", None]})
    pq.write_table(table, tmp_path / "t.parquet")
    dataset = pack_at(TableSource(path=str(tmp_path / "t.parquet"), label_column="label"), tmp_path / "set")
    assert sorted(dataset.split("train").keys) == ["cat/000", "cat/001"]
    assert dataset.manifest.classes == ("cat",)
    assert reasons(tmp_path / "set") == {}


CLS = [(b"3", "3"), (b"3\n", "3"), (b" 3.0\r\n", "3"), (b"\xef\xbb\xbfcat", "cat"), (b"-1", None), (b"nan", None)]


@pytest.mark.parametrize(("cls", "name"), CLS)
@pytest.mark.parametrize("meta", [None, {}, {"label": None}, {"label": "", "width": 40}, {"label": float("nan")}])
def test_a_cls_member_is_the_label_where_the_json_has_none(cls, name, meta, tmp_path):
    members = {"cls": cls, "jpg": image_bytes(0)} | ({} if meta is None else {"json": json.dumps(meta).encode()})
    make_tar(tmp_path / "t-0.tar", {"a": members})
    found = find(ShardSource(path=str(tmp_path)))
    assert ([record.class_name for record in found.records], found.bad) == ([name], ())


def test_labels_of_json_and_cls_agree_or_the_sample_is_named(tmp_path):
    pairs = {"a": (3.0, b"3"), "b": ("cat", b"cat\n"), "c": (3, b"4"), "d": (3, b"-1")}
    samples = {
        key: {"jpg": image_bytes(0), "cls": cls, "json": json.dumps({"label": label, "group": "nan"}).encode()}
        for key, (label, cls) in pairs.items()
    }
    named = {"jpg": image_bytes(0), "cls": b"7", "json": b'{"class_name": "cat"}'}
    make_tar(tmp_path / "t-0.tar", samples | {"e": named})
    found = find(ShardSource(path=str(tmp_path)))
    assert {r.name: (r.class_name, r.group) for r in found.records} == {
        "a.jpg": ("3", None),
        "b.jpg": ("cat", None),
        "d.jpg": ("3", None),
        "e.jpg": ("cat", None),
    }
    assert found.bad == (("t-0.tar/c", "the json member has the label '3', and the cls member has '4'"),)


def test_class_folders_are_names_by_the_same_rule(tmp_path):
    make_folder(tmp_path, counts={"1.0": 1, "2": 1, "nan": 1, "-1": 1, "unlabelled": 1})
    found = find(FolderSource(path=str(tmp_path)))
    assert {r.name.partition("/")[0]: r.class_name for r in found.records} == {
        "1.0": "1",
        "2": "2",
        "nan": None,
        "-1": None,
        "unlabelled": None,
    }
    assert found.layout == "<class>/*, without a label in -1, nan, unlabelled"


def test_split_lists_of_windows_are_matched_and_one_that_names_nothing_is_refused(tmp_path):
    make_folder(tmp_path / "im", counts={"a": 2, "b": 2})
    (tmp_path / "train.txt").write_bytes(b"\xef\xbb\xbf.\\a\\000.jpg\r\n.\\b\\000.jpg\r\n")
    (tmp_path / "test.txt").write_text("old/im/a/001.jpg 0\nold/im/b/001.jpg 1\n")
    files = {name: str(tmp_path / f"{name}.txt") for name in ("train", "test")}
    dataset = pack_at(tmp_path / "im", tmp_path / "set", splits=FileSplits(files=files))
    assert sorted(dataset.split("train").keys) == ["a/000", "b/000"]
    assert sorted(dataset.split("test").keys) == ["a/001", "b/001"]
    assert reasons(tmp_path / "set") == {}
    (tmp_path / "test.txt").write_text("n0001.JPEG\nn0002.JPEG\n")
    with pytest.raises(
        UserError, match=r"files\.test lists 2 names, .*'n0001.JPEG': give paths .* such as 'a/000.jpg'"
    ):
        pack_at(tmp_path / "im", tmp_path / "other", splits=FileSplits(files=files))


def test_listed_labels_are_matched_as_split_lists_are(tmp_path):
    make_folder(tmp_path / "im", counts={"a": 2, "b": 2})
    split = pack_at(tmp_path / "im", tmp_path / "set").split("train")
    (tmp_path / "shown.txt").write_bytes(b"\xef\xbb\xbf./a/000.jpg\r\nb\\001.jpg\r\n")
    settings = ListedLabels(path=str(tmp_path / "shown.txt"))
    label_N = visible_labels(split.label_N, settings, keys=split.keys, seed=0)
    assert {key for key, label in zip(split.keys, label_N, strict=True) if label >= 0} == {"a/000", "b/001"}


@pytest.mark.parametrize("folder", [b"train/caf\xe9", b"caf\xe9/cat", b"train/cat/caf\xe9"])
def test_names_that_are_not_utf8_are_refused_by_name_and_packed_once_they_are_renamed(folder, tmp_path):
    images = make_folder(tmp_path / "im", counts={"train/a": 3, "train/b": 3})
    odd = Path(str(images)) / folder.decode("utf-8", "surrogateescape")
    odd.mkdir(parents=True)
    (odd / "0.jpg").write_bytes(image_bytes(7))
    dataset = pack_at(images, tmp_path / "set")
    shown = folder.decode("utf-8", "backslashreplace") + "/0.jpg"
    assert list(reasons(tmp_path / "set")) == [shown]
    assert "rename it" in reasons(tmp_path / "set")[shown]
    assert dataset.open(dataset.url).manifest == dataset.manifest
    for part in (odd, odd.parent):
        if "\udce9" in part.name:
            part.rename(part.with_name("cafe"))
    renamed = pack_at(images, tmp_path / "again", limit=0.0)
    assert sum(split.num_samples for split in renamed.manifest.splits.values()) == 7


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00003.tar", "train"),
        ("train_00000_of_00003.tar", "train"),
        ("train-00002-of-00003-0123456789abcdef.tar", "train"),
        ("validation.3of7.tar", "validation"),
        ("train-000012.tar", "train"),
        ("cifar-10-train-0003.tar", "cifar-10-train"),
        ("train2017-0001.tar", "train2017"),
        ("test/000012.tar", "test"),
        ("test/00000-of-00002.tar", "test"),
        ("val/shard-00001.tar", "val"),
        ("data/train-0.tar", "train"),
    ],
)
def test_shards_of_one_split_are_one_split(name, split, tmp_path):
    make_tar(tmp_path / "tars" / name, {"a": {"jpg": image_bytes(0), "cls": b"0"}})
    assert [record.split for record in find(ShardSource(path=str(tmp_path / "tars"))).records] == [split]
