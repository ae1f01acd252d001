import dataclasses
import multiprocessing
import os
import signal
import tarfile
import time
from pathlib import Path

import cv2
import fsspec
import numpy as np
import pytest

from dpkd.backends.local_pool import LocalPool
from dpkd.data.shards import Dataset
from dpkd.data.tars import TarWriter
from dpkd.errors import StorageError, UserError
from dpkd.priors.catalogue.edge import Edge
from dpkd.priors.catalogue.orientation import Hog
from dpkd.priors.catalogue.regions import Superpixel
from dpkd.priors.codecs import CODECS
from dpkd.priors.record import Record, StoredMap
from dpkd.priors.store import PriorIndex, PriorSet
from dpkd.report.quarantine import Quarantine
from dpkd.settings import PrepareSettings
from dpkd.stages.prepare import prepare
from tests.prior_cases import SerialPool, draw_images, pack_folder, prepare_all

NUM_SHARDS = 4


@pytest.fixture
def dataset(tmp_path) -> Dataset:
    """Twelve images in three shards of train, three in one of test."""
    return pack_folder(draw_images(tmp_path / "images"), tmp_path / "shards")


def prior_files(dataset: Dataset) -> dict[str, bytes]:
    folder = Path(dataset.url) / "priors/default"
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def times(dataset: Dataset) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (Path(dataset.url) / "priors/default").glob("*.tar")}


def records(dataset: Dataset, shard: str) -> list[Record]:
    """The records of a prior shard."""
    with tarfile.open(Path(dataset.url) / "priors/default" / shard) as tar:
        return [Record.from_bytes(tar.extractfile(member).read()) for member in tar]


def mark(dataset: Dataset, kind: str) -> None:
    """Replaces all maps of a kind by single grey cells under the same fingerprint: to compute them again shows."""
    for path in (Path(dataset.url) / "priors/default").glob("*.tar"):
        marked = []
        for record in records(dataset, path.name):
            old: StoredMap = record.maps[kind]
            grey = CODECS[old.codec].encode(np.full((1, 1, 1), 0.3, np.float32))
            stored = old._replace(shape=(1, 1, 1), data=grey)
            marked.append(dataclasses.replace(record, maps={**record.maps, kind: stored}))
        with path.open("wb") as file:
            tar = TarWriter(file)
            members = [tar.add(f"{record.key}.priors.msgpack", record.to_bytes()) for record in marked]
            tar.finish()
        place = path.with_name(path.name.replace(".tar", ".index.msgpack"))
        index = PriorIndex.from_bytes(place.read_bytes())
        shard = index.shard.model_copy(update={"size_bytes": tar.size_bytes, "sha256": tar.sha256})
        offsets, sizes = ([getattr(member, name) for member in members] for name in ("offset", "size"))
        place.write_bytes(dataclasses.replace(index, shard=shard, offsets=offsets, sizes=sizes).to_bytes())


def is_marked(stored: StoredMap) -> bool:
    return stored.shape == (1, 1, 1)


def test_progress_is_told_in_samples_and_ends_with_all(dataset):
    told = []
    prepare(
        dataset,
        PrepareSettings(priors=(Edge(),)),
        pool=SerialPool(),
        quarantine=Quarantine(Path(dataset.url) / "q.jsonl", limit=0),
        progress=lambda done, total: told.append((done, total)),
    )
    assert len(told) == NUM_SHARDS
    assert told[-1] == (15, 15)


def test_worker_processes_write_the_same_bytes_as_one_process(dataset, tmp_path):
    prepare_all(dataset)
    alone = prior_files(dataset)
    again = pack_folder(tmp_path / "images", tmp_path / "again")
    prepare_all(again, pool=LocalPool(2))
    assert prior_files(again) == alone


def test_a_finished_preparation_is_left_as_it_is(dataset):
    prepare_all(dataset)
    before = times(dataset)
    prepare_all(dataset)
    assert times(dataset) == before
    assert len(before) == NUM_SHARDS


class DyingPool(SerialPool):
    """Dies after a number of items."""

    def __init__(self, num_items):
        self.num_items = num_items

    def map(self, function, items):
        yield from super().map(function, items[: self.num_items])
        raise KeyboardInterrupt


def test_what_was_interrupted_does_not_open_and_goes_on_with_the_missing_shards_alone(dataset, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        prepare_all(dataset, pool=DyingPool(2))
    with pytest.raises(UserError, match="prepare"):
        PriorSet.open(dataset.url, "default")
    before = times(dataset)
    assert len(before) == 2
    prepare_all(dataset)
    after = times(dataset)
    assert {name: after[name] for name in before} == before
    unbroken = pack_folder(tmp_path / "images", tmp_path / "unbroken")
    prepare_all(unbroken)
    assert prior_files(dataset) == prior_files(unbroken)


def _prepare_in_process(url):
    prepare_all(Dataset.open(url))


def test_kill_9_at_any_time_leaves_nothing_half_written_and_the_end_is_the_same(dataset, tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=_prepare_in_process, args=(dataset.url,))
    process.start()
    folder = Path(dataset.url) / "priors/default"
    while process.is_alive() and len(list(folder.glob("*.tar"))) < 2:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    for path in folder.glob("[!.]*.tar"):
        assert len(records(dataset, path.name)) in {2, 3, 5}
    prepare_all(dataset)
    unbroken = pack_folder(tmp_path / "images", tmp_path / "unbroken")
    prepare_all(unbroken)
    ours = {name: data for name, data in prior_files(dataset).items() if not name.startswith(".")}
    assert ours == prior_files(unbroken)


def test_a_damaged_shard_is_made_again_and_its_index_too(dataset):
    prepare_all(dataset)
    whole = prior_files(dataset)
    folder = Path(dataset.url) / "priors/default"
    (folder / "train-000000.tar").write_bytes(whole["train-000000.tar"][:1500])
    (folder / "train-000001.index.msgpack").write_bytes(b"\xc1")
    (folder / "train-000002.tar").unlink()
    prepare_all(dataset)
    assert prior_files(dataset) == whole


def test_a_prior_that_is_added_is_computed_alone(dataset):
    prepare_all(dataset, priors=(Edge(),))
    mark(dataset, "edge")
    prepare_all(dataset, priors=(Hog(), Edge()))
    for record in records(dataset, "train-000000.tar"):
        assert list(record.maps) == ["hog", "edge"]
        assert is_marked(record.maps["edge"])
        assert record.maps["hog"].shape == (5, 4, 9)


def test_a_prior_whose_settings_changed_is_computed_again_and_one_taken_out_is_gone(dataset):
    prepare_all(dataset, priors=(Edge(), Superpixel(), Hog()))
    mark(dataset, "edge")
    prior_set = prepare_all(dataset, priors=(Edge(), Superpixel(region_px=8)))
    kept = records(dataset, "test-000000.tar")
    assert all(is_marked(record.maps["edge"]) for record in kept)
    assert set(prior_set.split("train").names) == {"edge", "superpixel"}
    prior_set = prepare_all(dataset, priors=(Edge(stride=4),))
    sample = dataset.split("test").read(0)
    assert prior_set.split("test").read(0, sample)["edge"].shape == (10, 8, 1)


def test_an_image_that_changed_is_computed_again_alone(dataset, tmp_path):
    prepare_all(dataset, priors=(Edge(),))
    mark(dataset, "edge")
    changed = tmp_path / "images/train/disc/3.png"
    cv2.imwrite(str(changed), cv2.flip(cv2.imread(str(changed)), 0))
    repacked = pack_folder(tmp_path / "images", tmp_path / "repacked")
    (tmp_path / "shards/priors").rename(tmp_path / "repacked/priors")
    prior_set = prepare_all(repacked, priors=(Edge(),))
    found = [record for name in prior_files(repacked) if name.endswith(".tar") for record in records(repacked, name)]
    assert [record.key for record in found if not is_marked(record.maps["edge"])] == ["train/disc/3"]
    split = repacked.split("train")
    assert all(prior_set.split("train").read(i, split.read(i)) for i in range(12))


def test_shards_that_the_data_set_no_longer_has_are_removed(dataset, tmp_path):
    prepare_all(dataset)
    fewer = pack_folder(tmp_path / "images", tmp_path / "fewer", samples_per_shard=12)
    (tmp_path / "shards/priors").rename(tmp_path / "fewer/priors")
    prepare_all(fewer)
    assert [name for name in prior_files(fewer) if name.endswith(".tar")] == ["test-000000.tar", "train-000000.tar"]


def test_two_priors_of_one_kind_are_refused():
    with pytest.raises(ValueError, match=r"priors makes the map 'edge' 2 times.*prepare\.name"):
        PrepareSettings(priors=(Edge(), Edge(stride=4)))


def test_a_place_that_cannot_be_written_is_named(dataset):
    (Path(dataset.url) / "priors").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match=r"cannot write .*priors/default"):
        prepare_all(dataset, report=Path(dataset.url) / "q.jsonl")


def test_remote_shards_are_prepared_in_place(tmp_path):
    local = pack_folder(draw_images(tmp_path / "images"), tmp_path / "shards")
    prepare_all(local)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "shards") + "/", "/prepare-test/", recursive=True)
    memory.rm("/prepare-test/priors", recursive=True)
    remote = Dataset.open("memory://prepare-test")
    prior_set = prepare_all(remote, report=tmp_path / "q.jsonl")
    assert memory.cat("/prepare-test/priors/default/train-000002.tar") == prior_files(local)["train-000002.tar"]
    sample = remote.split("test").read(1)
    assert set(prior_set.split("test").read(1, sample)) == {"edge", "saliency", "superpixel", "hog"}
