"""A packed data set from elsewhere: manifest and indexes of any bytes are read or refused, nothing else is touched."""

import json
import shutil
from pathlib import Path

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpkd.data.shards import Dataset, ShardIndex, ShardInfo
from dpkd.errors import UserError
from dpkd.io import record
from tests.data.packing import make_folder, pack_at
from tests.fuzz.damage import any_bytes, outcome, unvouched

INDEX, MANIFEST, TAR = "train-000000.index.msgpack", "dataset.json", "train-000000.tar"


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    make_folder(folder / "images", counts={"train/cat": 3, "train/unlabelled": 1}, masks=True)
    pack_at(folder / "images", folder / "set")
    return folder / "set"


@pytest.fixture
def own(packed, tmp_path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copytree(packed, tmp_path / "set"))


def checked(data: bytes) -> None:
    index = ShardIndex.from_bytes(data)
    assert len(index.keys) == len(index.label_N) == index.shard.num_samples
    for offset_N, size_N in index.members.values():
        assert offset_N.dtype == size_N.dtype == np.int64
        assert (
            (offset_N == -1) | ((offset_N >= 0) & (size_N >= 0) & (offset_N + size_N <= index.shard.size_bytes))
        ).all()


@given(data=st.data())
def test_any_bytes_are_an_index_or_refused(packed, data):
    original = (packed / INDEX).read_bytes()
    read = data.draw(any_bytes([original]))
    assert (outcome(lambda: checked(read)) is None) == (read == original)


@given(data=st.data())
def test_any_bytes_are_a_manifest_or_refused(packed, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("manifest")
    (folder / MANIFEST).write_bytes(data.draw(any_bytes([(packed / MANIFEST).read_bytes()])))
    try:
        Dataset.open(str(folder))
    except UserError as error:
        assert MANIFEST in str(error)  # noqa: PT017 (either outcome is right, the message must name the file)


@pytest.mark.parametrize(
    "name", ["../x.tar", "/tmp/x.tar", "a/b.tar", "..tar", ".x.tar", "x", "", "x\0.tar", "x\n.tar"]
)
def test_a_shard_is_a_file_of_its_own_folder(own, name):
    content = unvouched(json.loads((own / MANIFEST).read_text()))
    content["splits"]["train"]["shards"][0]["name"] = name
    (own / MANIFEST).write_bytes(record.checked(content))
    with pytest.raises(UserError, match=r"dataset\.json is not the manifest of a data set"):
        Dataset.open(str(own))


def test_a_checksum_that_is_a_path_never_names_a_copy(own, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="sha256"):
        ShardInfo(name="a.tar", num_samples=1, size_bytes=1, sha256="../../../stray")


def test_a_shard_that_is_shorter_than_it_says_costs_no_memory(own):
    content = unvouched(json.loads((own / MANIFEST).read_text()))
    index = unvouched(msgpack.unpackb((own / INDEX).read_bytes()))
    content["splits"]["train"]["shards"][0]["size_bytes"] = index["shard"]["size_bytes"] = 2**51
    index["members"]["jpg"][1][0] = 2**50
    (own / MANIFEST).write_bytes(record.checked(content))
    (own / INDEX).write_bytes(record.pack_checked(index))
    with pytest.raises(UserError, match=r"train-000000\.tar, sample .*: the shard is cut short"):
        Dataset.open(str(own)).split("train").read(0)


@given(data=st.data())
def test_any_bytes_of_a_shard_give_samples_or_a_reason(packed, data, tmp_path_factory):
    folder = Path(shutil.copytree(packed, tmp_path_factory.mktemp("shard") / "set"))
    (folder / TAR).write_bytes(data.draw(any_bytes([(packed / TAR).read_bytes()])))
    split, original = (Dataset.open(str(each)).split("train") for each in (folder, packed))
    for i in range(split.num_samples):
        told = outcome(lambda i=i: split.read(i))
        assert told is not None or split.read(i) == original.read(i)
