"""What `dpkd inspect` says of data sets and prior sets, whole and damaged."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from dpkd import cli
from dpkd.data.shards import Dataset
from dpkd.errors import UserError
from dpkd.io.record import checked
from dpkd.io.storage import digest
from dpkd.priors.catalogue.edge import Edge
from dpkd.priors.catalogue.regions import Expert
from dpkd.priors.record import Record
from dpkd.priors.store import MANIFEST_NAME, PriorIndex
from dpkd.verbs.inspect import inspect
from tests.damage import change_member, flip_header, vouch, zeros
from tests.data.packing import make_folder, pack_at
from tests.prior_cases import draw_images, pack_folder, prepare_all


@pytest.fixture
def dataset(tmp_path) -> Dataset:
    """Fifteen images in two splits, with a prior set of four maps."""
    packed = pack_folder(draw_images(tmp_path / "images"), tmp_path / "shards")
    prepare_all(packed)
    return packed


def test_a_whole_data_set_is_counted_with_its_maps(dataset, capsys):
    inspect(dataset.url)
    said = capsys.readouterr().out
    assert "every shard fits its manifest" in said
    assert "prior set default: 0 of 15 samples have flat maps" in said
    assert "every readable sample has its 4 maps, each readable and of its image" in said
    assert any("│ saliency" in line for line in said.splitlines())


def test_a_data_set_without_maps_is_inspected_too(tmp_path, capsys):
    packed = pack_folder(draw_images(tmp_path / "images"), tmp_path / "shards")
    inspect(packed.url)
    assert "prior set" not in capsys.readouterr().out


def test_each_damaged_or_missing_shard_is_named(dataset):
    (Path(dataset.url) / "train-000000.tar").write_bytes(b"other")
    (Path(dataset.url) / "train-000002.tar").unlink()
    with pytest.raises(
        UserError, match=r"train-000000\.tar has another sha256.*train-000002\.tar is missing.*pack again"
    ):
        inspect(dataset.url)


def test_a_damaged_prior_shard_is_named(dataset):
    path = Path(dataset.url) / "priors/default/test-000000.tar"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"priors/default: test-000000\.tar has another sha256.*prepare stage again"):
        inspect(dataset.url)


def test_samples_that_cannot_be_read_are_told_from_those_with_flat_maps(tmp_path, capsys):
    """One image that nothing decodes, and one mask that is no image, in shards that are as they were packed."""
    packed = pack_at(make_folder(tmp_path / "images", counts={"train/a": 8}, masks=True), tmp_path / "shards")
    lost = change_member(packed.split("train"), 6, "jpg", flip_header)
    change_member(packed.split("train"), 1, "mask.png", zeros)
    dataset = vouch(packed)
    prepare_all(dataset, priors=(Edge(), Expert(of="mask")), limit=0.5)
    inspect(dataset.url)
    said = capsys.readouterr().out
    assert "prior set default: 1 of 8 samples have flat maps" in said
    assert f"prior set default: 1 could not be read and are left out: {lost}" in said
    assert "every readable sample has its 2 maps" in said
    inspect(dataset.url, picture=tmp_path / "p.png", set_name="default")  # none of those it chooses is the lost one
    with pytest.raises(UserError, match=f"maps of '{lost}': they do not exist"):
        inspect(dataset.url, picture=tmp_path / "p.png", set_name="default", keys=[lost])


def test_a_damaged_shard_is_refused_after_a_word_on_what_was_left_out(dataset, capsys):
    lost = change_member(dataset.split("train"), 2, "png", zeros)
    prepare_all(dataset, limit=0.1)
    with pytest.raises(UserError, match=r"train-000000\.tar has another sha256"):
        inspect(dataset.url)
    assert f"1 could not be read and are left out: {lost}" in capsys.readouterr().out


def test_maps_of_another_image_are_found_though_every_hash_is_right(dataset):
    """Exchanges two samples' bytes of equal size in the prior shard, and makes index and manifest vouch for it."""
    folder = Path(dataset.url) / "priors/default"
    tar, place = folder / "train-000000.tar", folder / "train-000000.index.msgpack"
    index, data = PriorIndex.from_bytes(place.read_bytes()), bytearray(tar.read_bytes())
    key = dataset.split("train").keys[1]
    first = data[index.offsets[0] : index.offsets[0] + index.sizes[0]]
    record = Record.from_bytes(bytes(first))
    foreign = Record(key=record.key, source=b"x" * 16, maps=record.maps, bad=None).to_bytes()
    assert len(foreign) == len(first)
    data[index.offsets[0] : index.offsets[0] + index.sizes[0]] = foreign
    shard = index.shard.model_copy(update={"sha256": digest(bytes(data))})
    tar.write_bytes(data)
    place.write_bytes(PriorIndex(**{**vars(index), "shard": shard}).to_bytes())
    manifest = folder / MANIFEST_NAME
    content = json.loads(manifest.read_text().replace(index.shard.sha256, shard.sha256))
    manifest.write_bytes(checked({key: value for key, value in content.items() if key != "checksum"}))
    with pytest.raises(UserError, match=f"maps of '{record.key}': they were computed from another image") as error:
        inspect(dataset.url)
    assert key not in str(error.value)


def test_a_picture_has_a_row_for_each_key_that_is_asked_for(dataset, tmp_path):
    few, more = tmp_path / "few.png", tmp_path / "new/more.png"
    inspect(dataset.url, picture=few, set_name="default", keys=["test/disc/1", "train/bar/3"])
    assert cli.main(["inspect", dataset.url, "--picture", str(more)]) == 0
    heights = [cv2.imread(str(path)).shape[0] for path in (few, more)]
    assert np.isclose((heights[1] - heights[0]), (heights[0] - 20))  # four rows and two, under one line of titles


def test_an_unknown_key_set_or_picture_format_is_refused_by_name(dataset, tmp_path):
    with pytest.raises(UserError, match=r"no sample 'test/disc/9'"):
        inspect(dataset.url, picture=tmp_path / "p.png", set_name="default", keys=["test/disc/9"])
    with pytest.raises(UserError, match="priors/other"):
        inspect(dataset.url, picture=tmp_path / "p.png", set_name="other")
    with pytest.raises(UserError, match=r"p\.txt.*\.png"):
        inspect(dataset.url, picture=tmp_path / "p.txt", set_name="default")
