import json
import os
import pickle
from pathlib import Path

import msgpack
import numpy as np
import pytest
import webdataset

from dpkd.data.labels import write_labels
from dpkd.data.sample import Sample, Unreadable
from dpkd.data.shards import Dataset, ShardIndex, Split, SplitInfo, index_name
from dpkd.errors import UserError
from dpkd.io import storage
from dpkd.io.record import checked, parse_checked
from tests.data.packing import image_bytes, make_folder, mask_bytes, pack_at


@pytest.fixture
def dataset(tmp_path) -> Dataset:
    folders = {"train/cat": 5, "train/dog": 3, "train/unlabelled": 2, "test/cat": 2}
    make_folder(tmp_path / "images", counts=folders, masks=True)
    (tmp_path / "images" / "train" / "cat" / "000.expert-eye.png").write_bytes(mask_bytes())
    return pack_at(tmp_path / "images", tmp_path / "set")


def test_samples_come_back_by_number_as_they_went_in(dataset, tmp_path):
    split = dataset.split("train")
    assert (split.num_samples, split.shard_sizes, len(split.keys)) == (10, [4, 4, 2], 10)
    for i, key in enumerate(split.keys):
        sample = split.read(i)
        assert sample.key == key
        assert sample.image == (tmp_path / "images" / f"{key}.jpg").read_bytes()
        assert sample.given["mask"] == mask_bytes()
        assert sample.meta["source"] == f"{key}.jpg"
        label = int(split.label_N[i])
        assert sample.meta["class_name"] == (dataset.manifest.classes[label] if label >= 0 else None)
        assert sample.meta["label"] == (label if label >= 0 else None)
        assert set(sample.given) == ({"mask", "eye"} if key == "train/cat/000" else {"mask"})
    assert [sample.key for k in range(3) for sample in split.read_shard(k)] == split.keys
    assert dataset.manifest.splits["train"].class_counts == (5, 3)
    assert dataset.manifest.splits["train"].num_unlabelled == 2


def test_a_plain_webdataset_reader_opens_the_shards(dataset):
    split = dataset.split("train")
    urls = [storage.join(dataset.url, shard.name) for shard in split.info.shards]
    seen = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in seen] == split.keys
    for i, sample in enumerate(seen):
        assert sample["json"] == split.read(i).meta
        assert sample["jpg"].shape == (16, 20, 3)
        assert sample["mask.png"].shape[:2] == (16, 20)
    assert "expert-eye.png" in seen[split.keys.index("train/cat/000")]


def test_a_split_pickles_small_and_reads_on_the_other_side(dataset):
    split = dataset.split("train")
    split.read(0)
    pickled = pickle.dumps(split)
    assert len(pickled) < 2000
    copy = pickle.loads(pickled)
    assert copy.read(7) == split.read(7)
    np.testing.assert_array_equal(copy.label_N, split.label_N)


def test_a_remote_data_set_is_packed_and_read_through_a_local_copy(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    make_folder(tmp_path / "images", counts={"train/cat": 5})
    url = f"memory://{tmp_path.name}"
    remote = pack_at(tmp_path / "images", url)
    local = pack_at(tmp_path / "images", tmp_path / "set")
    assert remote.manifest == local.manifest
    assert [remote.split("train").read(i) for i in range(5)] == [local.split("train").read(i) for i in range(5)]
    assert storage.list_names(url) == storage.list_names(local.url)
    assert pack_at(tmp_path / "images", url).manifest == local.manifest


def test_an_unknown_split_is_refused_with_the_names_there_are(dataset):
    with pytest.raises(UserError, match=r"no split 'trian'; it has: test, train"):
        dataset.split("trian")


def test_a_sample_number_out_of_range_is_our_mistake(dataset):
    with pytest.raises(IndexError):
        dataset.split("test").read(2)
    with pytest.raises(IndexError):
        dataset.split("test").read(-1)


def test_a_missing_or_cut_shard_is_named(dataset):
    place = storage.join(dataset.url, dataset.split("test").info.shards[0].name)
    size_bytes = storage.size(place)
    os.truncate(place, 1500)
    with pytest.raises(UserError, match=r"test-000000.tar, sample 'test/cat/00\d': the shard is cut short.*pack"):
        dataset.split("test").read(1)
    assert dataset.split("test").fault(0) == f"it is cut short: it has 1,500 of {size_bytes:,} bytes"
    storage.remove(place)
    for read in (Split.read, Split.fault):
        with pytest.raises(UserError, match=r"test-000000.tar is missing"):
            read(dataset.split("test"), 0)


def change_byte(place: str, offset: int) -> None:
    with Path(place).open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("extension", ["jpg", "json", "mask.png"])
def test_a_sample_whose_bytes_changed_is_named_and_its_neighbours_are_read(dataset, extension):
    split = dataset.split("train")
    before = [split.read(i) for i in range(4)]
    offset_N, size_N = split.index(0).members[extension]
    place = storage.join(dataset.url, split.info.shards[0].name)
    change_byte(place, int(offset_N[2] + size_N[2] // 2))
    damaged = dataset.split("train")
    with pytest.raises(UserError, match=f"train-000000.tar, sample '{before[2].key}': its bytes changed after packing"):
        damaged.read(2)
    found = list(damaged.read_shard(0))
    assert isinstance(found[2], Unreadable)
    assert [found[i] for i in (0, 1, 3)] == [before[i] for i in (0, 1, 3)]
    assert damaged.fault(0) == "its checksum differs from the one in dataset.json"
    assert damaged.fault(1) is None


def test_a_sample_is_read_from_a_shard_damaged_elsewhere(dataset):
    split = dataset.split("test")
    before = list(split.read_shard(0))
    change_byte(storage.join(dataset.url, "test-000000.tar"), 20)  # in a header, which no sample needs
    damaged = dataset.split("test")
    assert damaged.fault(0) is not None
    assert list(damaged.read_shard(0)) == before


def test_a_shard_put_in_the_place_of_another_gives_none_of_its_samples(dataset):
    split = dataset.split("train")
    first, second = (storage.join(dataset.url, f"train-00000{k}.tar") for k in range(2))
    storage.write_bytes_atomic(first, storage.read_bytes(second))
    assert [(type(each), each.key) for each in dataset.split("train").read_shard(0)] == [
        (Unreadable, key) for key in split.keys[:4]
    ]


def test_a_damaged_remote_shard_gives_no_sample_and_a_reason_for_each(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    make_folder(tmp_path / "images", counts={"train/cat": 5})
    url = f"memory://{tmp_path.name}"
    split = pack_at(tmp_path / "images", url).split("train")
    place = storage.join(url, "train-000000.tar")
    storage.write_bytes_atomic(place, storage.read_bytes(place)[:-1])
    found = list(split.read_shard(0))
    assert [each.key for each in found] == split.keys[:4]
    assert {each.reason for each in found} == {
        "its shard is damaged: its checksum differs from the one in dataset.json"
    }
    assert isinstance(next(split.read_shard(1)), Sample)


def test_an_index_that_is_missing_broken_or_of_another_shard_is_named(dataset):
    place = storage.join(dataset.url, "test-000000.index.msgpack")
    other = storage.read_bytes(storage.join(dataset.url, "train-000000.index.msgpack"))
    for content, message in (
        (other, "does not belong to the test-000000.tar"),
        (other[:40], "cannot be read"),
        (b"", "cannot be"),
    ):
        storage.write_bytes_atomic(place, content)
        with pytest.raises(UserError, match=message):
            dataset.split("test").read(0)
    storage.remove(place)
    with pytest.raises(UserError, match=r"index.msgpack is missing"):
        dataset.split("test").read(0)


def test_an_index_survives_its_file(dataset):
    index = dataset.split("train").index(0)
    again = ShardIndex.from_bytes(index.to_bytes())
    assert again.to_bytes() == index.to_bytes()
    assert (again.keys, again.shard) == (index.keys, index.shard)


def test_a_folder_without_a_usable_manifest_is_no_data_set(dataset, tmp_path):
    with pytest.raises(UserError, match=r"no data set at .*dataset.json is missing"):
        Dataset.open(str(tmp_path))
    place = storage.join(dataset.url, "dataset.json")
    content = parse_checked(storage.read_bytes(place))
    storage.write_bytes_atomic(place, checked({**content, "format_version": 99}))
    with pytest.raises(UserError, match="format version 99"):
        Dataset.open(dataset.url)
    storage.write_bytes_atomic(place, b'{"classes": 3')
    with pytest.raises(UserError, match="not the manifest of a data set"):
        Dataset.open(dataset.url)


def test_image_statistics_are_those_of_the_training_pixels(tmp_path):
    for i in range(3):
        place = tmp_path / "images" / "train" / "a" / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(image_bytes(i, image_format="PNG"))
    manifest = pack_at(tmp_path / "images", tmp_path / "set").manifest
    pixels = np.concatenate(
        [np.random.default_rng(i).integers(0, 256, (16, 20, 3), dtype=np.uint8).reshape(-1, 3) for i in range(3)]
    )
    np.testing.assert_allclose(manifest.image_mean, pixels.mean(0) / 255, rtol=1e-12)
    np.testing.assert_allclose(manifest.image_std, pixels.std(0) / 255, rtol=1e-12)


def test_a_label_or_key_changed_in_an_index_is_noticed(dataset):
    place = storage.join(dataset.url, "train-000000.index.msgpack")
    content = msgpack.unpackb(storage.read_bytes(place))
    for column, value in (("labels", 0), ("keys", "train/dog/009")):
        changed = {**content, column: [*content[column][:-1], value]}
        assert changed != content
        storage.write_bytes_atomic(place, msgpack.packb(changed))
        with pytest.raises(UserError, match=r"train-000000\.index\.msgpack cannot be read: .*its checksum is wrong"):
            dataset.split("train").index(0)


def test_the_labels_of_a_split_are_those_of_its_shards_and_only_they_are_read(dataset):
    split, without_file = dataset.split("train"), dataset.split("train").info.model_copy(update={"labels": None})
    expected = [sample.meta["label"] for k in range(3) for sample in split.read_shard(k)]
    for shard in split.info.shards:
        Path(dataset.url, index_name(shard.name)).rename(Path(dataset.url, f"{shard.name}.away"))
    label_N = dataset.split("train").label_N
    assert [None if label < 0 else label for label in label_N.tolist()] == expected
    assert (label_N.dtype, label_N.flags.writeable) == (np.dtype("<i2"), False)
    for shard in split.info.shards:
        Path(dataset.url, f"{shard.name}.away").rename(Path(dataset.url, index_name(shard.name)))
    assert Split(dataset.url, "train", without_file).label_N.tolist() == label_N.tolist()


def test_more_classes_than_16_bits_number_keep_their_labels(tmp_path):
    label_N = np.array([0, 2**15 - 1, 2**15, -1])
    info = SplitInfo(num_samples=4, num_unlabelled=1, class_counts=(), shards=())
    for num_classes, kept in ((2**15 - 1, label_N[[0, 3, 3, 0]]), (2**15, label_N)):
        written = info.model_copy(update={"labels": write_labels(str(tmp_path), "a", kept, num_classes=num_classes)})
        assert Split(str(tmp_path), "a", written).label_N.tolist() == kept.tolist()


def test_a_label_file_that_is_changed_cut_or_missing_is_named(dataset):
    place = Path(dataset.url, "train.labels.npy")
    data = place.read_bytes()
    changed = [data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :] for i in range(len(data))]
    for damaged in (*changed, data[:-1], data + b"\0", b""):
        place.write_bytes(damaged)
        with pytest.raises(UserError, match=r"train\.labels\.npy cannot be read: its checksum differs"):
            _ = dataset.split("train").label_N
    place.unlink()
    with pytest.raises(UserError, match=r"train\.labels\.npy is missing"):
        _ = dataset.split("train").label_N


def test_a_number_changed_in_the_manifest_is_noticed(dataset):
    place = storage.join(dataset.url, "dataset.json")
    content = json.loads(storage.read_bytes(place))
    storage.write_bytes_atomic(place, json.dumps({**content, "image_mean": [0.1, 0.2, 0.3]}).encode())
    with pytest.raises(UserError, match=r"dataset\.json is not the manifest of a data set: its checksum is wrong"):
        Dataset.open(dataset.url)
