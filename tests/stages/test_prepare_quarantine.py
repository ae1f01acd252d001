"""What `prepare` does with samples that cannot be read and with maps that cannot be computed."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpkd.data.images import decode_image
from dpkd.data.shards import MANIFEST_NAME, Dataset, Manifest, SplitInfo
from dpkd.data.sources.records import Blob, Record
from dpkd.data.writer import Planned, ShardJob, write_shard
from dpkd.errors import UserError
from dpkd.io import storage
from dpkd.priors.catalogue.edge import Edge
from dpkd.priors.catalogue.orientation import Hog
from dpkd.priors.catalogue.regions import Expert
from dpkd.priors.store import PriorMismatch, PriorSet
from tests.damage import change_member, cut_inside, flip_header, vouch, zeros
from tests.data.packing import make_folder, pack_at
from tests.prior_cases import ALL, draw_images, pack_folder, prepare_all

PRIORS = (Edge(), Hog())


@pytest.fixture
def dataset(tmp_path) -> Dataset:
    """Twelve PNGs in three shards of train, three in one of test."""
    return pack_folder(draw_images(tmp_path / "images"), tmp_path / "shards")


@pytest.fixture
def photographs(tmp_path) -> Dataset:
    """Eight JPEGs with masks in two shards."""
    return pack_at(make_folder(tmp_path / "images", counts={"train/a": 8}, masks=True), tmp_path / "photographs")


@pytest.fixture
def report(tmp_path) -> Path:
    return tmp_path / "quarantine.jsonl"


def lines(report: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in report.read_text().splitlines()]


def counted(report: Path) -> dict[str, str]:
    """item -> reason of the samples in the report."""
    return {line["item"]: line["reason"] for line in lines(report) if line.get("counted", True)}


def assert_only_these_are_lost(dataset: Dataset, split_name: str, lost: list[int]) -> None:
    """Every other sample of the split has maps that are bound to its own image."""
    priors = PriorSet.open(dataset.url, "default")
    assert priors.unreadable(split_name).tolist() == lost
    split, maps = dataset.split(split_name), priors.split(split_name)
    for i in sorted({*range(split.num_samples)} - {*lost}):
        sample = split.read(i)
        record = maps.record(i, sample)
        assert (record.key, record.bad) == (split.keys[i], None)
        assert maps.read(i, sample)


@pytest.mark.parametrize("change", [zeros, lambda data: data[:-1] + bytes([data[-1] ^ 1])])
def test_a_damaged_sample_is_named_counted_and_listed_and_the_others_get_their_maps(dataset, report, change, capsys):
    key = change_member(dataset.split("train"), 7, "png", change)
    prior_set = prepare_all(dataset, limit=0.1, report=report)
    assert counted(report) == {f"train-000001.tar/{key}": "its bytes changed after packing (the checksum differs)"}
    (note,) = [line for line in lines(report) if not line.get("counted", True)]
    assert note["item"] == "train-000001.tar"
    assert "its checksum differs" in note["reason"]
    assert "1 of its 5 samples cannot be read" in note["reason"]
    assert "train-000001.tar is damaged" in capsys.readouterr().out
    assert_only_these_are_lost(dataset, "train", [7])
    assert_only_these_are_lost(dataset, "test", [])
    assert prior_set.manifest.num_flat == 0
    before = lines(report)
    prepare_all(dataset, limit=0.1, report=report)
    assert lines(report) == before


def test_damage_that_still_decodes_is_found(photographs, report):
    """A bit inside the picture's data: other pixels, and no decoder says a word."""
    split = photographs.split("train")
    before = decode_image(split.read(2).image)
    key = change_member(split, 2, "jpg", lambda data: data[:-60] + bytes([data[-60] ^ 4]) + data[-59:])
    offset_N, size_N = split.index(0).members["jpg"]
    after = decode_image(storage.read_range(Path(split.url) / "train-000000.tar", int(offset_N[2]), int(size_N[2])))
    assert after.shape == before.shape
    assert (after != before).any()
    prepare_all(photographs, priors=PRIORS, limit=0.2, report=report)
    assert list(counted(report)) == [f"train-000000.tar/{key}"]
    assert_only_these_are_lost(photographs, "train", [2])


def test_an_image_that_was_packed_and_cannot_be_decoded_is_lost_alone(photographs, report):
    """As where another release of the decoder refuses what the packing one took: the shard is as it was packed."""
    key = change_member(photographs.split("train"), 5, "jpg", flip_header)
    dataset = vouch(photographs)
    prepare_all(dataset, priors=PRIORS, limit=0.2, report=report)
    assert [line["item"] for line in lines(report)] == [f"train-000001.tar/{key}"]
    assert "cannot be decoded" in counted(report)[f"train-000001.tar/{key}"]
    assert_only_these_are_lost(dataset, "train", [5])


def test_a_map_that_cannot_be_computed_is_flat_and_its_sample_stays(photographs, report):
    key = change_member(photographs.split("train"), 5, "mask.png", zeros)
    dataset = vouch(photographs)
    prior_set = prepare_all(dataset, priors=(Edge(), Expert(of="mask")), limit=0.2, report=report)
    assert "the expert map 'mask' cannot be used" in counted(report)[f"train-000001.tar/{key}"]
    assert (prior_set.manifest.num_flat, prior_set.unreadable("train").tolist()) == (1, [])
    maps = prior_set.split("train").read(5, dataset.split("train").read(5))
    assert {name: np.unique(map_HWC.round(1)).tolist() for name, map_HWC in maps.items()} == {
        "edge": [0.5],
        "expert-mask": [0.5],
    }


def test_a_flat_map_favours_no_place(photographs):
    change_member(photographs.split("train"), 0, "mask.png", zeros)
    dataset = vouch(photographs)
    prior_set = prepare_all(dataset, priors=(*ALL, Expert(of="mask")), limit=0.2)
    maps = prior_set.split("train").read(0, dataset.split("train").read(0))
    assert {name: np.unique(map_HWC.round(1)).tolist() for name, map_HWC in maps.items()} == {
        "edge": [0.5],
        "saliency": [0.5],
        "superpixel": [0],
        "hog": [0.5],
        "expert-mask": [0.5],
    }


def test_every_sample_that_a_cut_shard_lacks_is_named_and_the_others_get_their_maps(dataset, report):
    split = dataset.split("train")
    lost = cut_inside(split, 7)
    prepare_all(dataset, limit=0.3, report=report)
    assert list(counted(report)) == [f"train-000001.tar/{key}" for key in lost]
    assert all("the shard is cut short" in reason for reason in counted(report).values())
    assert_only_these_are_lost(dataset, "train", [7, 8, 9])


def test_maps_are_never_served_for_a_sample_that_could_not_be_read(dataset):
    place = Path(dataset.url) / "train-000000.tar"
    whole = place.read_bytes()
    sample = dataset.split("train").read(3)
    cut_inside(dataset.split("train"), 3)
    prior_set = prepare_all(dataset, limit=0.3)
    with pytest.raises(PriorMismatch, match=r"could not be read \(the shard is cut short.*run the prepare stage again"):
        prior_set.split("train").read(3, sample)
    place.write_bytes(whole)  # mended, and not prepared again
    with pytest.raises(PriorMismatch, match="they do not exist"):
        prior_set.split("train").read(3, dataset.split("train").read(3))


def test_a_shard_that_was_mended_is_looked_at_again_under_the_same_priors(dataset, report):
    prepare_all(dataset)
    unbroken = {path.name: path.read_bytes() for path in (Path(dataset.url) / "priors/default").iterdir()}
    place = Path(dataset.url) / "train-000000.tar"
    whole = place.read_bytes()
    change_member(dataset.split("train"), 1, "png", zeros)
    prepare_all(dataset, priors=ALL[:2], limit=0.1, report=report)
    prepare_all(dataset, limit=0.1, report=report)
    assert len(counted(report)) == 1
    place.write_bytes(whole)
    prepare_all(dataset, report=report)
    assert lines(report) == []
    assert {path.name: path.read_bytes() for path in (Path(dataset.url) / "priors/default").iterdir()} == unbroken


def test_damage_after_a_finished_preparation_is_found_by_the_next_one(dataset, report):
    prepare_all(dataset, report=report)
    key = change_member(dataset.split("train"), 1, "png", zeros)
    prepare_all(dataset, limit=0.1, report=report)
    assert list(counted(report)) == [f"train-000000.tar/{key}"]
    assert_only_these_are_lost(dataset, "train", [1])


def test_damage_that_touches_no_sample_is_noted_and_loses_none(dataset, report):
    place = Path(dataset.url) / "train-000002.tar"
    data = bytearray(place.read_bytes())
    data[-1] ^= 1  # in the end mark
    place.write_bytes(data)
    prepare_all(dataset, limit=0, report=report)
    assert [(line["item"], line["counted"]) for line in lines(report)] == [("train-000002.tar", False)]
    assert_only_these_are_lost(dataset, "train", [])


def test_more_bad_samples_than_the_limit_stop_the_stage(dataset):
    change_member(dataset.split("train"), 0, "png", zeros)
    change_member(dataset.split("train"), 5, "png", zeros)
    with pytest.raises(UserError, match=r"2 of 15 samples.*data\.bad_limit=0\.1"):
        prepare_all(dataset, limit=0.1)
    with pytest.raises(UserError, match="no complete prior set"):
        PriorSet.open(dataset.url, "default")


@pytest.mark.parametrize("name", ["train-000001.tar", "train-000001.index.msgpack"])
def test_a_shard_or_an_index_that_is_missing_stops_the_stage_whatever_the_limit(dataset, name):
    (Path(dataset.url) / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing.*pack again or copy the file"):
        prepare_all(dataset, limit=1)


def test_a_cut_shard_is_never_merged_with_the_next_where_keys_recur(tmp_path, report):
    """webdataset goes on with the next tar and joins halves of two samples (`tests/data/test_sources.py` shows it)."""
    dataset = recurring_keys(tmp_path)
    split = dataset.split("train")
    images = [split.read(i).image for i in range(6)]
    assert split.keys == ["a", "b", "c", "c", "d", "e"]
    assert cut_inside(split, 2) == ["c"]
    prepare_all(dataset, priors=PRIORS, limit=0.2, report=report)
    assert list(counted(report)) == ["train-000000.tar/c"]
    assert_only_these_are_lost(dataset, "train", [2])
    maps, damaged = PriorSet.open(dataset.url, "default").split("train"), dataset.split("train")
    assert [damaged.read(i).image for i in (0, 1, 3, 4, 5)] == [images[i] for i in (0, 1, 3, 4, 5)]
    with pytest.raises(PriorMismatch):
        maps.read(2, damaged.read(3))  # the record of the lost `c` is not served to the other `c`


def recurring_keys(folder: Path) -> Dataset:
    """Two shards of three samples each; the last of the first and the first of the second share a key."""
    random = np.random.default_rng(0)
    infos = []
    for number, keys in enumerate(["abc", "cde"]):
        samples = []
        for key in keys:
            path = folder / f"{number}-{key}.png"
            Image.fromarray(random.integers(0, 256, (32, 40, 3), dtype=np.uint8)).save(path)
            samples.append(Planned(key=key, label=number, record=Record(path.name, Blob(str(path)))))
        job = ShardJob(url=str(folder / "set"), split="train", name=f"train-{number:06d}.tar", samples=tuple(samples))
        infos.append(write_shard(job).shard)
    info = SplitInfo(num_samples=6, num_unlabelled=0, class_counts=(3, 3), shards=tuple(infos))
    manifest = Manifest(
        classes=("one", "two"), splits={"train": info}, image_mean=(0.5,) * 3, image_std=(0.2,) * 3, made_from={}
    )
    (folder / "set" / MANIFEST_NAME).write_bytes(manifest.to_bytes())
    return Dataset.open(str(folder / "set"))
