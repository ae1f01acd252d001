"""Prepare with priors of models, in one pass, or with a first pass on an accelerator; here all on the CPU."""

import json
import multiprocessing
import os
import shutil
import signal
import tarfile
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from dpkd.backends.local_pool import LocalPool
from dpkd.data.images import decode_image
from dpkd.data.shards import Dataset
from dpkd.errors import UserError
from dpkd.priors import learned
from dpkd.priors.base import ImageViews
from dpkd.priors.catalogue.edge import Edge
from dpkd.priors.catalogue.orientation import Hog
from dpkd.priors.record import Record
from dpkd.report.quarantine import Quarantine
from dpkd.settings import PrepareSettings
from dpkd.stages.prepare import prepare
from dpkd.verbs.inspect import inspect
from tests.model_cases import attention_prior, edge_prior, save_edges, save_onnx, save_vit
from tests.prior_cases import SerialPool, draw_images, pack_folder, prepare_all

NUM_SHARDS = 4
TWO_POOLS = (SerialPool(), "cpu:0")
"""The CPU under the name of one device among several, as a GPU has one."""


@pytest.fixture
def dataset(tmp_path) -> Dataset:
    """Twelve images in three shards of train, three in one of test."""
    return pack_folder(draw_images(tmp_path / "images"), tmp_path / "shards")


@pytest.fixture
def again(tmp_path, dataset) -> Dataset:
    """The same data set at another place, with nothing prepared."""
    return pack_folder(tmp_path / "images", tmp_path / "again")


@pytest.fixture
def priors(tmp_path):
    """Class attention, an edge prior, and learned edges, in batches that do not divide a shard."""
    save_vit(tmp_path / "vit.safetensors")
    save_edges(tmp_path / "edges.onnx")
    return (
        attention_prior(tmp_path / "vit.safetensors", batch_size=3),
        Edge(),
        edge_prior(tmp_path / "edges.onnx", batch_size=4),
    )


def files(dataset: Dataset) -> dict[str, bytes]:
    """Every file of the prior set, hidden ones too."""
    return {path.name: path.read_bytes() for path in sorted((Path(dataset.url) / "priors/default").iterdir())}


def records(dataset: Dataset) -> dict[str, Record]:
    """The record of every sample."""
    found = {}
    for path in sorted((Path(dataset.url) / "priors/default").glob("[!.]*.tar")):
        with tarfile.open(path) as tar:
            found |= {each.key: each for each in (Record.from_bytes(tar.extractfile(member).read()) for member in tar)}
    return found


class CountingPool(SerialPool):
    """Counts what it has done, and can be told to die after a number of items."""

    def __init__(self, *, dies_after: int | None = None) -> None:
        self.num_done = 0
        self._dies_after = dies_after

    def map(self, function, items, **options):
        for result in super().map(function, items, **options):
            if self.num_done == self._dies_after:
                raise KeyboardInterrupt
            self.num_done += 1
            yield result


def test_stored_maps_are_those_of_the_model_run_by_hand(dataset, priors):
    prior_set = prepare_all(dataset, priors=priors)
    assert prior_set.channels["learned-attention"] == 1
    split, maps = dataset.split("train"), prior_set.split("train")
    for i in range(12):
        sample = split.read(i)
        stored = maps.read(i, sample)
        for prior in (priors[0], priors[2]):
            map_HWC = prior.map(ImageViews(decode_image(sample.image)))
            expected_HWC = prior.codec.decode(prior.codec.encode(map_HWC), map_HWC.shape)
            np.testing.assert_allclose(stored[prior.name], expected_HWC, atol=0.03)
            assert np.abs(stored[prior.name] - map_HWC).mean() < 0.03


def test_two_pools_write_the_bytes_of_one(dataset, again, priors):
    prepare_all(dataset, priors=priors)
    prepare_all(again, priors=priors, accelerator=TWO_POOLS)
    assert files(again) == files(dataset)
    assert len(files(again)) == 2 * NUM_SHARDS + 1


@pytest.mark.nightly
@pytest.mark.slow
def test_worker_processes_of_two_pools_write_the_bytes_of_one(dataset, again, priors):
    prepare_all(dataset, priors=priors)
    accelerator = (LocalPool(1, environments=[{"CUDA_VISIBLE_DEVICES": ""}]), "cpu:0")
    prepare_all(again, priors=priors, pool=LocalPool(1), accelerator=accelerator)
    assert files(again) == files(dataset)


def test_the_second_pool_runs_no_model(dataset, priors, tmp_path):
    class LeavingPool(SerialPool):
        """Takes the models away once it is through with all items."""

        def map(self, function, items, **options):
            results = list(super().map(function, items, **options))
            for name in ("vit.safetensors", "edges.onnx"):
                (tmp_path / name).rename(tmp_path / f"{name}.gone")
            learned._loaded.cache_clear()
            yield from results

    prepare_all(dataset, priors=priors, accelerator=(LeavingPool(), "cpu:0"))
    assert {name for record in records(dataset).values() for name in record.maps} == {prior.name for prior in priors}


def test_a_prior_that_asks_for_the_cpu_does_not_go_to_the_accelerator(dataset, priors):
    pool = CountingPool()
    on_cpu = tuple(prior if isinstance(prior, Edge) else prior.model_copy(update={"device": "cpu"}) for prior in priors)
    prepare_all(dataset, priors=on_cpu, accelerator=(pool, "cpu:0"))
    assert pool.num_done == 0
    whole = files(dataset)
    prepare_all(dataset, priors=priors, accelerator=(pool, "cpu:0"))
    assert pool.num_done == NUM_SHARDS
    assert {name: data for name, data in files(dataset).items() if name != "priors.json"} == {
        name: data for name, data in whole.items() if name != "priors.json"
    }


class DeadPool(SerialPool):
    """Dies before its first item."""

    def map(self, function, items, **options):
        raise KeyboardInterrupt


def test_a_first_pass_that_was_interrupted_goes_on_with_the_shards_that_are_missing(dataset, again, priors):
    prepare_all(again, priors=priors)
    with pytest.raises(KeyboardInterrupt):
        prepare_all(dataset, priors=priors, accelerator=(CountingPool(dies_after=2), "cpu:0"))
    folder = Path(dataset.url) / "priors/default"
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert 0 < len(before) < 2 * NUM_SHARDS
    with pytest.raises(KeyboardInterrupt):
        prepare_all(dataset, priors=priors, pool=DeadPool(), accelerator=TWO_POOLS)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(files(dataset)) == 2 * NUM_SHARDS
    prepare_all(dataset, priors=priors, accelerator=TWO_POOLS)
    assert files(dataset) == files(again)


def test_a_second_pass_that_was_interrupted_keeps_the_shards_that_are_whole(dataset, again, priors):
    prepare_all(again, priors=priors)
    with pytest.raises(KeyboardInterrupt):
        prepare_all(dataset, priors=priors, pool=CountingPool(dies_after=1), accelerator=TWO_POOLS)
    whole = {name: data for name, data in files(dataset).items() if files(again)[name] == data}
    assert {"train-000000.tar", "train-000000.index.msgpack"} <= whole.keys()
    assert "priors.json" not in whole
    before = {name: (Path(dataset.url) / "priors/default" / name).stat().st_mtime_ns for name in whole}
    prepare_all(dataset, priors=priors, accelerator=TWO_POOLS)
    assert files(dataset) == files(again)
    assert {name: (Path(dataset.url) / "priors/default" / name).stat().st_mtime_ns for name in whole} == before


def test_the_maps_of_other_priors_are_carried_through_the_first_pass(dataset, priors):
    """They are computed anew neither by it nor after it: the shards that it leaves hold all of them."""
    prepare_all(dataset, priors=(Edge(), Hog()))
    before = records(dataset)
    with pytest.raises(KeyboardInterrupt):
        prepare_all(dataset, priors=(*priors, Hog()), pool=DeadPool(), accelerator=TWO_POOLS)
    for key, record in records(dataset).items():
        assert list(record.maps) == ["learned-attention", "edge", "learned-edges", "hog"]
        assert (record.maps["edge"], record.maps["hog"]) == (before[key].maps["edge"], before[key].maps["hog"])


def _prepare_on_processes(url, priors):
    accelerator = (LocalPool(1), "cpu:0")
    prepare_all(Dataset.open(url), priors=priors, pool=LocalPool(1), accelerator=accelerator)


@pytest.mark.chaos
def test_kill_9_of_the_driver_of_two_pools_leaves_what_the_next_run_ends_with_the_same_bytes(dataset, again, priors):
    prepare_all(again, priors=priors)
    process = multiprocessing.get_context("spawn").Process(target=_prepare_on_processes, args=(dataset.url, priors))
    process.start()
    folder = Path(dataset.url) / "priors/default"
    while process.is_alive() and not list(folder.glob("[!.]*.tar")):
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert "priors.json" not in files(dataset)
    _prepare_on_processes(dataset.url, priors)
    assert {name: data for name, data in files(dataset).items() if not name.startswith(".tmp-")} == files(again)


def test_what_was_interrupted_on_two_pools_goes_on_on_one(dataset, again, priors):
    prepare_all(again, priors=priors)
    with pytest.raises(KeyboardInterrupt):
        prepare_all(dataset, priors=priors, pool=CountingPool(dies_after=1), accelerator=TWO_POOLS)
    prepare_all(dataset, priors=priors)
    assert files(dataset) == files(again)


@pytest.mark.parametrize("accelerator", [None, TWO_POOLS], ids=["one pool", "two pools"])
def test_other_weights_compute_that_map_alone(dataset, priors, tmp_path, accelerator):
    prepare_all(dataset, priors=priors, accelerator=accelerator)
    before = records(dataset)
    save_vit(tmp_path / "vit.safetensors", seed=1)
    prepare_all(dataset, priors=(*priors, Hog()), accelerator=accelerator)
    after = records(dataset)
    assert before.keys() == after.keys()
    for key, record in after.items():
        assert list(record.maps) == ["learned-attention", "edge", "learned-edges", "hog"]
        assert record.maps["edge"] == before[key].maps["edge"]
        assert record.maps["learned-edges"] == before[key].maps["learned-edges"]
        assert record.maps["learned-attention"].data != before[key].maps["learned-attention"].data


def test_weights_that_have_moved_compute_nothing(dataset, priors, tmp_path):
    prepare_all(dataset, priors=priors)
    before = {name: data for name, data in files(dataset).items() if name != "priors.json"}
    shutil.move(tmp_path / "vit.safetensors", tmp_path / "moved.safetensors")
    learned._loaded.cache_clear()
    moved = (attention_prior(tmp_path / "moved.safetensors", batch_size=3), *priors[1:])
    manifest = prepare_all(dataset, priors=moved).manifest
    assert {name: data for name, data in files(dataset).items() if name != "priors.json"} == before
    assert manifest.priors[0].model.file == str(tmp_path / "moved.safetensors")


@pytest.mark.parametrize("accelerator", [None, TWO_POOLS], ids=["one pool", "two pools"])
def test_a_changed_image_gets_the_bytes_of_a_fresh_preparation(dataset, priors, tmp_path, accelerator):
    prepare_all(dataset, priors=priors, accelerator=accelerator)
    changed = tmp_path / "images/train/disc/3.png"
    cv2.imwrite(str(changed), cv2.flip(cv2.imread(str(changed)), 0))
    repacked = pack_folder(tmp_path / "images", tmp_path / "repacked")
    fresh = pack_folder(tmp_path / "images", tmp_path / "fresh")
    shutil.move(tmp_path / "shards/priors", tmp_path / "repacked/priors")
    prepare_all(repacked, priors=priors, accelerator=accelerator)
    prepare_all(fresh, priors=priors)
    assert files(repacked) == files(fresh)


class Choosy(nn.Module):
    """Gives NaN for images brighter than the middle."""

    def forward(self, image_BCHW):
        return torch.sqrt(0.5 - torch.sigmoid(image_BCHW[:, :1].mean((2, 3), keepdim=True))) + 0 * image_BCHW[:, :1]


def spoil(dataset: Dataset, row: int) -> str:
    """Overwrites the image of a sample of the first shard with zeros; returns its key."""
    split = dataset.split("train")
    offsets, sizes = split.index(0).members["png"]
    with (Path(dataset.url) / split.info.shards[0].name).open("r+b") as file:
        file.seek(offsets[row])
        file.write(bytes(int(sizes[row])))
    return split.keys[row]


def test_a_bad_sample_is_named_once_with_the_same_reason_on_one_pool_and_on_two(dataset, again, priors, tmp_path):
    save_onnx(tmp_path / "choosy.onnx", Choosy())
    priors = (edge_prior(tmp_path / "choosy.onnx", of="choosy", scale="unit", model={"output": None}), *priors)
    reports = []
    for place, accelerator in ((dataset, None), (again, TWO_POOLS)):
        spoiled = spoil(place, row=1)
        report = tmp_path / f"{Path(place.url).name}.jsonl"
        prepare_all(place, priors=priors, accelerator=accelerator, limit=1, report=report)
        lines = [json.loads(line) for line in report.read_text().splitlines()]
        reports.append({line["item"]: line["reason"] for line in lines})
        assert len(lines) == len(reports[-1])
    assert reports[0] == reports[1]
    assert files(again) == files(dataset)
    others = {reason for item, reason in reports[0].items() if "/" in item and not item.endswith(spoiled)}
    assert others == {"the map 'learned-choosy' has values that are not finite"}
    assert f"train-000000.tar/{spoiled}" in reports[0]
    assert len(reports[0]) < 15


def test_a_model_that_cannot_run_stops_the_stage_and_blames_no_sample(dataset, priors, tmp_path):
    wrong = (Edge(), edge_prior(tmp_path / "edges.onnx", channels=3))
    report = tmp_path / "report.jsonl"
    for accelerator in (None, TWO_POOLS):
        with pytest.raises(UserError, match=r"the prior 'learned-edges', .*edges\.onnx: its output has the shape"):
            prepare_all(dataset, priors=wrong, accelerator=accelerator, limit=1, report=report)
        assert not report.exists() or not report.read_text()
        assert not list(Path(dataset.url).glob("priors/default/*.tar"))


def test_missing_weights_stop_before_any_work(dataset, priors, tmp_path):
    (tmp_path / "vit.safetensors").unlink()
    pool = CountingPool()
    with pytest.raises(UserError, match=r"'learned-attention', .*is missing: give the path of the weights"):
        prepare_all(dataset, priors=priors, pool=pool)
    assert pool.num_done == 0


def test_a_prepared_set_needs_no_weights_where_the_settings_name_them_by_checksum(dataset, priors, tmp_path):
    manifest = prepare_all(dataset, priors=priors).manifest
    (tmp_path / "vit.safetensors").unlink()
    (tmp_path / "edges.onnx").unlink()
    learned._loaded.cache_clear()
    assert prepare_all(dataset, priors=manifest.priors).manifest == manifest


def test_progress_grows_over_both_passes_and_ends_with_every_sample(dataset, priors):
    counts = []
    prepare(
        dataset,
        PrepareSettings(priors=priors),
        pool=SerialPool(),
        accelerator=TWO_POOLS,
        quarantine=Quarantine(Path(dataset.url) / "q.jsonl", limit=0),
        progress=lambda done, total: counts.append((done, total)),
    )
    assert counts == sorted(counts)
    assert counts[NUM_SHARDS - 1 :: NUM_SHARDS] == [(7, 15), (15, 15)]


def test_too_many_bad_samples_stop_the_first_pass_already(dataset, priors, tmp_path):
    save_onnx(tmp_path / "choosy.onnx", Choosy())
    choosy = edge_prior(tmp_path / "choosy.onnx", of="choosy", scale="unit", model={"output": None})
    pool = CountingPool()
    with pytest.raises(UserError, match=r"the map 'learned-choosy' has values that are not finite"):
        prepare_all(dataset, priors=(choosy, *priors), pool=pool, accelerator=TWO_POOLS)
    assert pool.num_done == 0


def test_the_set_is_inspected_and_drawn_with_its_learned_maps(dataset, priors, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    prepare_all(dataset, priors=priors, accelerator=TWO_POOLS)
    inspect(dataset.url)
    said = capsys.readouterr().out
    assert "has its 3 maps, each readable and of its image" in said
    assert "│ learned-attention" in said
    assert "│ learned-edges" in said
    inspect(dataset.url, picture=tmp_path / "sheet.png", set_name="default")
    drawn = cv2.imread(str(tmp_path / "sheet.png"))
    assert drawn.std() > 10
    assert "4 samples with their maps" in capsys.readouterr().out
