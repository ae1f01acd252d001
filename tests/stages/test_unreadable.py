"""Training and evaluation over a data set that lost samples, against one that never had them."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpkd.backends.local_pool import LocalPool
from dpkd.data.order import ClassAwareOrder, Order
from dpkd.data.settings import FolderSource, LabelFraction
from dpkd.data.shards import Dataset
from dpkd.engine.settings import TrainingSettings
from dpkd.objectives.supervised import Supervised
from dpkd.report.quarantine import Quarantine
from dpkd.run.folder import RunFolder
from dpkd.stages.evaluate import evaluate, read_evaluation
from dpkd.stages.pack import pack
from dpkd.stages.prepare import prepare
from dpkd.stages.run import Run, supervision, training_set
from dpkd.stages.training import sample_order
from tests.damage import change_member, zeros
from tests.runs import with_data

LOST = {"base": (5, 6, 70), "val": (0,), "novel": (17, 60)}


def prepared(run: Run, *, limit: float) -> None:
    quarantine = Quarantine(run.folder.quarantine, limit=limit)
    dataset = Dataset.open(str(run.folder.path / "shards"))
    prepare(dataset, run.settings.prepare, pool=LocalPool(1), quarantine=quarantine, progress=lambda *_: None)


@pytest.fixture(scope="module")
def lossy(untrained_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A copy of the run in which some samples of every split were damaged after they were packed."""
    folder = tmp_path_factory.mktemp("lossy") / "run"
    shutil.copytree(untrained_run.folder.path, folder)
    run = dataclasses.replace(untrained_run, folder=RunFolder(folder))
    for split, numbers in LOST.items():
        for i in numbers:
            change_member(run.dataset.split(split), i, "jpg", zeros)
    prepared(run, limit=0.1)
    return run


@pytest.fixture(scope="module")
def smaller(untrained_run: Run, sample_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same networks beside a data set that was packed without those samples."""
    folder = tmp_path_factory.mktemp("smaller")
    source = Path(shutil.copytree(sample_folder, folder / "images"))
    for split, numbers in LOST.items():
        for i in numbers:
            key = untrained_run.dataset.split(split).keys[i]
            for path in source.glob(f"{key}.*"):
                path.unlink()
    shutil.copytree(untrained_run.folder.path, folder / "run", ignore=shutil.ignore_patterns("shards"))
    moved = dataclasses.replace(untrained_run, folder=RunFolder(folder / "run"))
    run = with_data(moved, source=FolderSource(path=str(source)))
    quarantine = Quarantine(run.folder.quarantine, limit=0)
    url = str(run.folder.path / "shards")
    pack(run.data, url, seed=run.seed, pool=LocalPool(1), quarantine=quarantine, progress=lambda *_: None)
    prepared(run, limit=0)
    return run


def settings(sampling: str) -> TrainingSettings:
    return TrainingSettings(epochs=2, batch_size=16, sampling=sampling)


def test_the_splits_hold_the_same_samples(lossy: Run, smaller: Run) -> None:
    for split, numbers in LOST.items():
        assert lossy.unreadable(split).tolist() == list(numbers)
        keys = lossy.dataset.split(split).keys
        assert [keys[i] for i in lossy.readable(split)] == smaller.dataset.split(split).keys
        assert len(smaller.unreadable(split)) == 0


@pytest.mark.parametrize("labels", [None, LabelFraction(fraction=0.5)])
def test_labels_and_their_statistics_are_those_of_the_samples_that_are_drawn(
    lossy: Run, smaller: Run, labels: Any
) -> None:
    if labels is not None:
        lossy, smaller = (with_data(run, labels=labels) for run in (lossy, smaller))
    ours, theirs = (training_set(run, settings("uniform"), [Supervised()]) for run in (lossy, smaller))
    assert (ours.num_samples, ours.class_names) == (theirs.num_samples, theirs.class_names)
    np.testing.assert_array_equal(np.delete(ours.label_N, ours.unreadable), theirs.label_N)
    one, other = (supervision(run, data, settings("uniform")) for run, data in ((lossy, ours), (smaller, theirs)))
    assert one.labelled_share == pytest.approx(other.labelled_share)
    assert torch.equal(one.log_prior_K, other.log_prior_K)


def test_class_aware_training_draws_the_same_samples(lossy: Run, smaller: Run) -> None:
    training = settings("class_aware")
    drawn = []
    for run in (lossy, smaller):
        data = training_set(run, training, [Supervised()])
        order, keys = sample_order(run, training, data), data.split.keys
        drawn.append([[keys[i] for i in order.batch(step)] for step in range(20)])
    assert drawn[0] == drawn[1]


def test_each_epoch_shows_every_sample_that_can_be_read_once(lossy: Run) -> None:
    training = settings("uniform")
    data = training_set(lossy, training, [Supervised()])
    order = sample_order(lossy, training, data)
    drawn = np.concatenate([order.batch(step) for step in range(3 * data.num_samples // 16 + 1)])
    for epoch in range(3):
        seen = drawn[epoch * data.num_samples : (epoch + 1) * data.num_samples]
        assert sorted(seen) == lossy.readable("base").tolist()


@pytest.mark.parametrize("sampling", ["uniform", "class_aware"])
def test_where_nothing_is_lost_the_order_is_the_plain_one(untrained_run: Run, sampling: Any) -> None:
    training = settings(sampling)
    data = training_set(untrained_run, training, [Supervised()])
    order = sample_order(untrained_run, training, data)
    if sampling == "uniform":
        plain: Any = Order(data.split.shard_sizes, seed=untrained_run.seed, global_batch_size=16, block_shards=8)
    else:
        plain = ClassAwareOrder(data.label_N, seed=untrained_run.seed, global_batch_size=16)
    for step in range(20):
        np.testing.assert_array_equal(order.batch(step), plain.batch(step))


def test_the_evaluation_is_that_of_the_data_set_without_them(lossy: Run, smaller: Run) -> None:
    reports = []
    for run in (lossy, smaller):
        evaluate(run)
        reports.append(without_speed(read_evaluation(run.folder)))
    assert reports[0] == reports[1]


def without_speed(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: without_speed(value) for key, value in tree.items() if key != "images_per_s"}
    return tree
