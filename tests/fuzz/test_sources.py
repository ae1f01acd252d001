"""Folders, tables and tars of any content give samples and named faults, or a UserError; nothing hangs or escapes."""

import io
import json
import os
import struct
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpkd.data import sources
from dpkd.data.image_headers import BrokenImage
from dpkd.data.settings import FolderSource, ShardSource, TableSource
from dpkd.data.sources.records import MAX_FILE_BYTES, Blob
from dpkd.data.tars import BLOCK, MAX_HEADER_BYTES, list_members
from dpkd.errors import UserError
from tests.data.packing import SerialPool, files_of, image_bytes, make_folder, pack_at, reasons
from tests.fuzz.damage import any_bytes, in_child, outcome


def member(name: str, data: bytes = b"", *, kind: bytes = tarfile.REGTYPE, size: int | None = None) -> bytes:
    """One member as the standard library writes it, of any type and any declared size."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "target"
    info.size = len(data) if size is None else size
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape") + data + bytes(-len(data) % BLOCK)


def pax(records: bytes, *, kind: bytes = tarfile.XHDTYPE) -> bytes:
    return member("pax", records, kind=kind)


END = bytes(2 * BLOCK)
SAMPLE = member("a.jpg", image_bytes(0)) + member("a.json", b'{"label": 1}')
LONG = "folder/" * 40 + "b"
TARS = [
    SAMPLE + END,
    SAMPLE + member(f"{LONG}.png", image_bytes(1, image_format="PNG")) + member(f"{LONG}.cls", b"3") + END,
    pax(b"18 path=b/c.d.jpg\n") + member("x", image_bytes(2)) + member("b/c.d.cls", b"0") + END,
    member("folder", kind=tarfile.DIRTYPE) + SAMPLE + member("l.jpg", kind=tarfile.SYMTYPE) + END,
]


def listing(data: bytes):
    return list_members(io.BytesIO(data), size_bytes=len(data))


@given(any_bytes(TARS))
def test_any_bytes_are_listed_and_every_member_is_inside(data):
    found = listing(data)
    assert all(each.offset >= BLOCK and each.size >= 0 for each in found.members)
    assert all(each.offset + each.size <= len(data) for each in found.members)
    assert found.fault is None or found.fault.startswith("the tar is ")


def test_members_that_are_no_plain_files_are_refused_by_name():
    kinds = {"l.jpg": tarfile.SYMTYPE, "h.jpg": tarfile.LNKTYPE, "c.jpg": tarfile.CHRTYPE, "p.jpg": tarfile.FIFOTYPE}
    data = b"".join(member(name, kind=kind, size=10**9) for name, kind in kinds.items())
    found = listing(member("d", kind=tarfile.DIRTYPE) + data + SAMPLE + END)
    assert [name for name, _ in found.refused] == list(kinds)
    assert [each.name for each in found.members] == ["a.jpg", "a.json"]
    assert found.fault is None


def test_a_sparse_member_is_refused():
    found = listing(member("s.jpg", bytes(600), kind=tarfile.GNUTYPE_SPARSE) + SAMPLE + END)
    assert [name for name, _ in found.refused] == ["s.jpg"]
    assert [each.name for each in found.members] == ["a.jpg", "a.json"]


@pytest.mark.parametrize(
    "header",
    [
        member("x.jpg", size=-512),
        member("x.jpg", size=2**60),
        member("n", size=2**50, kind=tarfile.GNUTYPE_LONGNAME),
        member("n", bytes(MAX_HEADER_BYTES + 1), kind=tarfile.GNUTYPE_LONGNAME),
        pax(b"17 size=99999999\n") + member("x.jpg"),
        pax(b"11 size=-9\n") + member("x.jpg"),
        pax(b"99999999999999999999 path=x\n") + member("x.jpg"),
        pax(b"0 path=x\n") + member("x.jpg"),
    ],
)
def test_sizes_and_headers_that_cannot_be_true_are_a_fault(header):
    found = listing(SAMPLE + header + END)
    assert [each.name for each in found.members] == ["a.jpg", "a.json"]
    assert found.fault is not None


def test_headers_upon_headers_do_not_exhaust_the_stack():
    chain = member("n", b"name\0", kind=tarfile.GNUTYPE_LONGNAME) * 20_000
    found = listing(SAMPLE + chain + member("x.jpg", b"y") + END)
    assert [each.name for each in found.members] == ["a.jpg", "a.json"]
    assert found.fault is not None


ODD_NAMES = [
    "/etc/passwd.jpg",
    "../../up.jpg",
    "a/../../b.jpg",
    "new\nline.jpg",
    "~/x.jpg",
    "c:\\x.jpg",
    "-r.jpg",
    "%2e%2e.jpg",
]


def test_odd_names_become_keys_that_stay_in_the_folder(tmp_path):
    images = [member(name, image_bytes(i)) for i, name in enumerate([*ODD_NAMES, "sur\udcffrogate.jpg"])]
    nul = pax(b"22 path=nu\0l/../x.jpg\n") + member("y", image_bytes(99))
    (tmp_path / "train-0.tar").write_bytes(b"".join(images) + nul + END)
    before = set(tmp_path.parent.rglob("*"))
    dataset = pack_at(ShardSource(path=str(tmp_path / "train-0.tar")), tmp_path / "set", limit=0.1)
    keys = dataset.split("train").keys
    assert len(keys) == len(ODD_NAMES) + 1
    assert [(name, words[:21]) for name, words in reasons(tmp_path / "set").items()] == [
        ("sur\\xffrogate.jpg", "its name is not UTF-8")
    ]
    assert all(not key.startswith("/") and ".." not in key.split("/") and key.isprintable() for key in keys)
    made = set(tmp_path.parent.rglob("*")) - before
    assert all(tmp_path in path.parents for path in made)
    with tarfile.open(tmp_path / "set" / "train-000000.tar") as archive:
        archive.extractall(tmp_path / "extracted", filter="data")


META = [b'{"label": 1, "class_name": "x", "group": "g", "attributes": {"a": [1]}}', b'{"label": -1}', b"[]"]
JSON_BOMBS = [b"[" * 100_000, b'{"a":' * 500 + b"1" + b"}" * 500, b"9" * 10_000, b'{"label": ' + b"9" * 3_000 + b"}"]
JSON_BOMBS += [b'{"group": "\\ud800"}', b'{"label": {"a": 1}}', b'{"label": 1e999}', b'{"class_name": [1]}']


@settings(max_examples=settings.default.max_examples // 2)
@given(meta=any_bytes(META) | st.sampled_from(JSON_BOMBS))
def test_any_json_member_gives_a_sample_or_a_named_fault(meta, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tar")
    (folder / "t-0.tar").write_bytes(member("k.jpg", image_bytes(0)) + member("k.json", meta) + END)
    found = sources.find(ShardSource(path=str(folder)), pool=SerialPool())
    assert len(found.records) + len(found.bad) == 1


def test_every_bomb_in_a_json_member_is_named(tmp_path):
    samples = [member(f"{i}.jpg", image_bytes(i)) + member(f"{i}.json", bomb) for i, bomb in enumerate(JSON_BOMBS)]
    huge = member("h.jpg", image_bytes(0)) + member("h.json", b" " * (2 << 20))
    (tmp_path / "t-0.tar").write_bytes(b"".join(samples) + huge + END)
    found = sources.find(ShardSource(path=str(tmp_path)), pool=SerialPool())
    assert (len(found.records), len(found.bad)) == (0, len(JSON_BOMBS) + 1)
    assert "more than 1,048,576" in found.bad[-1][1]


def parquet() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"path": ["a.jpg", "b.jpg"], "label": [0, 1], "more": [["x"], None]}), buffer)
    return buffer.getvalue()


TABLES = {
    "csv": [b'path,label,more\na.jpg,0,\nb.jpg,1,"x,y"\n'],
    "tsv": [b"path\tlabel\tmore\na.jpg\t0\t\n"],
    "jsonl": [b'{"path": "a.jpg", "label": 0, "more": {"x": [1]}}\n{"path": "b.jpg", "label": null, "more": 2}\n'],
    "parquet": [parquet()],
}


@given(data=st.data(), suffix=st.sampled_from(sorted(TABLES)))
def test_any_bytes_are_a_table_or_refused(data, suffix, tmp_path_factory):
    place = tmp_path_factory.mktemp("table") / f"t.{suffix}"
    place.write_bytes(data.draw(any_bytes(TABLES[suffix])))
    source = TableSource(path=str(place), label_column="label", attribute_columns=("more",))

    def read() -> None:
        contents = sources.find(source, pool=SerialPool())
        names = [record.name for record in contents.records]
        assert names == sorted(set(names))
        assert all(reason for _, reason in contents.bad)
        json.dumps([vars_of(each) for each in contents.records]).encode()

    outcome(read)


def vars_of(record) -> list:
    return [record.name, record.class_name, record.attributes]


def test_a_table_with_odd_paths_names_each_of_them_and_reads_no_pipe(tmp_path):
    make_folder(tmp_path, counts={"cat": 1})
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    odd = [
        "pipe.jpg",
        "gone.jpg",
        "loop.jpg",
        "cat",
        "/dev/zero",
        "nul\0.jpg",
        "x" * 5_000,
        "\ud800.jpg",
    ]
    rows = [{"path": path} for path in ["cat/000.jpg", str(tmp_path / "cat" / "000.jpg"), *odd]]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = TableSource(path=str(tmp_path / "t.jsonl"))
    dataset = pack_at(source, tmp_path / "set", splits={"kind": "fraction", "fractions": {"train": 1.0}}, limit=1.0)
    assert dataset.split("train").num_samples == 2  # a table is the user's own: paths in it may be absolute
    assert len(reasons(tmp_path / "set")) == len(odd)


def test_a_parquet_file_that_unpacks_to_terabytes_is_refused(tmp_path):
    rows = 2_000_000
    column = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), ["x" * 1_000_000])
    pq.write_table(pa.table({"path": column}), tmp_path / "t.parquet")
    assert (tmp_path / "t.parquet").stat().st_size < 1_000_000
    code = """
import sys
from dpkd.data.settings import TableSource
from dpkd.data.sources.tables import find_in_table
from dpkd.errors import UserError
try:
    find_in_table(TableSource(path=sys.argv[1]))
except UserError as error:
    print(error)
"""
    told = in_child(code, str(tmp_path / "t.parquet"), memory_bytes=4 << 30)
    assert "times its size" in told, told


def test_a_folder_with_pipes_loops_and_names_of_any_bytes_is_packed_without_them(tmp_path):
    folder = make_folder(tmp_path / "images", counts={"train/cat": 2})
    os.mkfifo(folder / "train" / "cat" / "pipe.jpg")
    (folder / "train" / "cat" / "self.jpg").symlink_to("self.jpg")
    (folder / "train" / "cat" / "up").symlink_to(folder)
    Path(os.fsdecode(os.fsencode(folder / "train" / "cat") + b"/\xff\xfe.jpg")).write_bytes(image_bytes(7))
    Path(os.fsdecode(os.fsencode(folder / "train" / "cat") + b"/\xfd.jpg")).write_bytes(b"broken")
    dataset = pack_at(folder, tmp_path / "set", limit=0.7)
    assert dataset.split("train").num_samples == 2
    assert {name: words[:15] for name, words in reasons(tmp_path / "set").items()} == {
        "train/cat/pipe.jpg": "it is not a fil",
        "train/cat/self.jpg": "it is not a fil",
        "train/cat/\\xfd.jpg": "its name is not",
        "train/cat/\\xff\\xfe.jpg": "its name is not",
    }
    assert pack_at(folder, tmp_path / "set", limit=0.7).manifest == dataset.manifest
    assert "train-000000.tar" in files_of(tmp_path / "set")


def test_a_file_larger_than_any_image_is_not_read(tmp_path):
    with (tmp_path / "x.jpg").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    found = sources.find(FolderSource(path=str(tmp_path)), pool=SerialPool())
    with pytest.raises(BrokenImage, match="more than 2,147,483,648"):
        found.records[0].image.read()


def test_a_blob_that_is_a_device_is_refused():
    with pytest.raises(BrokenImage, match="a device"):
        Blob("/dev/zero").read()


def test_unbalanced_braces_are_refused():
    with pytest.raises(UserError, match="brace"):
        sources.find(ShardSource(path="x-{0..3.tar"), pool=SerialPool())


def test_a_tar_that_is_a_folder_or_a_pipe_is_named(tmp_path):
    (tmp_path / "folder.tar").mkdir()
    os.mkfifo(tmp_path / "pipe.tar")
    for name in ("folder.tar", "pipe.tar"):
        found = sources.find(ShardSource(path=str(tmp_path / name)), pool=SerialPool())
        assert found.bad == ((name, "it is not a file, but a folder, a pipe, a device or a broken link"),)


def test_a_header_of_base_256_is_read(tmp_path):
    data = bytearray(member("x.jpg", b"y" * 10))
    data[124:136] = b"\x80" + struct.pack(">11B", *([0] * 10), 10)
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + 8 * 32 + sum(data[156:BLOCK]))
    assert [each.size for each in listing(bytes(data) + END).members] == [10]
