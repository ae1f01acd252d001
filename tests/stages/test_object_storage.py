"""Pack and prepare on S3, beside the same on a local disk: the same bytes, whatever dies or fails on the way."""

import signal
import threading
import time
from itertools import count
from pathlib import Path

import psutil
import pytest

from dpkd.backends.local_pool import LocalPool
from dpkd.data.settings import FolderSource, ShardSource
from dpkd.data.shards import MANIFEST_NAME, Dataset
from dpkd.errors import StorageUnavailable, UserError
from dpkd.priors.catalogue.edge import Edge
from dpkd.priors.catalogue.orientation import Hog
from dpkd.priors.store import PriorSet
from dpkd.report.quarantine import Quarantine
from dpkd.settings import DataSettings
from dpkd.stages.pack import pack
from dpkd.verbs.inspect import inspect
from tests.object_store import BUCKET, ObjectStore
from tests.prior_cases import SerialPool, draw_images, pack_folder
from tests.prior_cases import prepare_all as prepare_with

pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, and beside them a packed and prepared data set of four shards."""
    folder = tmp_path_factory.mktemp("local")
    prepare_all(pack_folder(draw_images(folder / "images"), folder / "shards"), report=folder / "bad.jsonl")
    return folder


@pytest.fixture(autouse=True)
def copies_stay_in_the_test(tmp_path, monkeypatch):
    """Copies of shards go to a folder of the test's own, so that none is left of the test before."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)


def prepare_all(dataset: Dataset, **options) -> PriorSet:
    return prepare_with(dataset, priors=(Edge(), Hog()), **options)  # quick to import in every worker


def contents(folder: Path) -> dict[str, bytes]:
    """Relative path -> content of every file of a data set."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pack_and_prepare(url: str, local: Path, beside: Path, *, pool, source: str | None = None) -> Dataset:
    data = DataSettings(source=FolderSource(path=source or str(local / "images")), samples_per_shard=5)
    quarantine = Quarantine(beside / "pack.jsonl", limit=0)
    dataset = pack(data, url, seed=0, pool=pool, quarantine=quarantine, progress=lambda *_: None)
    prepare_all(dataset, pool=pool, report=beside / "prepare.jsonl")
    return dataset


def puts_of(store: ObjectStore) -> list[str]:
    """The list to which every object that is written from now on is added."""
    puts: list[str] = []

    def note(method: str, path: str) -> None:
        if method == "PUT":
            puts.append(path.removeprefix(f"/{BUCKET}/"))

    store.fault = note
    return puts


def test_shards_and_maps_on_s3_are_those_of_a_local_run(local, object_store, tmp_path):
    for name, content in contents(local / "images").items():
        object_store.client().put_object(Bucket=BUCKET, Key=f"images/{name}", Body=content)
    dataset = pack_and_prepare("s3://bucket/same", local, tmp_path, pool=SerialPool(), source="s3://bucket/images")
    assert object_store.objects("same/") == contents(local / "shards")
    inspect(dataset.url)
    here = Dataset.open(str(local / "shards"))
    maps, maps_here = (PriorSet.open(each.url, "default").split("train") for each in (dataset, here))
    for i in range(12):
        sample = dataset.split("train").read(i)
        assert sample == here.split("train").read(i)
        assert maps.record(i, sample).to_bytes() == maps_here.record(i, sample).to_bytes()
    assert dataset.split("train").label_N.tolist() == here.split("train").label_N.tolist()
    puts = puts_of(object_store)
    pack_and_prepare(dataset.url, local, tmp_path, pool=SerialPool(), source="s3://bucket/images")
    labels = {f"{split}.labels.npy" for split in dataset.manifest.splits}
    assert {Path(name).name for name in puts} <= {MANIFEST_NAME, "priors.json", *labels}


def test_tars_on_s3_are_a_source_by_pattern_and_by_folder(local, object_store, tmp_path):
    for path in (local / "shards").glob("*.tar"):
        object_store.client().put_object(Bucket=BUCKET, Key=f"tars/{path.name}", Body=path.read_bytes())
    expected = pack_tars(str(local / "shards" / "t*-*.tar"), tmp_path / "here", tmp_path)
    for number, source in enumerate(("s3://bucket/tars/t*-{000000..000002}.tar", "s3://bucket/tars")):
        packed = pack_tars(source, tmp_path / str(number), tmp_path)
        assert packed.manifest.splits == expected.manifest.splits
    with pytest.raises(UserError, match=r"s3://bucket/none/\* has no \.tar"):
        pack_tars("s3://bucket/none/*", tmp_path / "none", tmp_path)


def pack_tars(source: str, destination: Path, beside: Path) -> Dataset:
    data = DataSettings(source=ShardSource(path=source), samples_per_shard=5)
    quarantine = Quarantine(beside / "tars.jsonl", limit=0)
    return pack(data, str(destination), seed=0, pool=SerialPool(), quarantine=quarantine, progress=lambda *_: None)


def test_after_an_interruption_just_the_missing_shards_are_made(local, object_store, tmp_path):
    dataset = pack_and_prepare("s3://bucket/again", local, tmp_path, pool=SerialPool())
    prior = "again/priors/default"
    gone = [f"{prior}/priors.json", f"{prior}/train-000001.tar", f"{prior}/test-000000.index.msgpack"]
    for name in gone:
        object_store.client().delete_object(Bucket=BUCKET, Key=name)
    puts = puts_of(object_store)
    prepare_all(dataset, report=tmp_path / "prepare.jsonl")
    again = [f"{prior}/{shard}" for shard in ("train-000001", "test-000000")]
    expected = [f"{shard}{ending}" for shard in again for ending in (".tar", ".index.msgpack")]
    assert sorted(puts) == sorted([*expected, f"{prior}/priors.json"])
    assert object_store.objects("again/") == contents(local / "shards")


def test_a_worker_killed_while_it_prepares_on_s3_changes_nothing(local, object_store, tmp_path):
    dataset = pack_folder(local / "images", "s3://bucket/killed")
    puts, killed = puts_of(object_store), threading.Event()
    note = object_store.fault

    def kill_at_the_third_write(method: str, path: str) -> None:
        note(method, path)
        if len(puts) == 3 and not killed.is_set():
            killed.set()
            workers = [each for each in psutil.Process().children() if "spawn_main" in " ".join(each.cmdline())]
            workers[0].send_signal(signal.SIGKILL)

    object_store.fault = kill_at_the_third_write
    prepare_all(dataset, pool=LocalPool(2), report=tmp_path / "prepare.jsonl")
    assert killed.is_set()
    assert object_store.objects("killed/") == contents(local / "shards")


def test_a_store_that_fails_and_dawdles_now_and_then_changes_nothing(local, object_store, tmp_path):
    number = count()

    def now_and_then(_method: str, _path: str) -> int | None:
        turn = next(number) % 16
        time.sleep(0.2 if turn == 6 else 0)
        return {4: 500, 11: 503}.get(turn)

    before, object_store.fault = object_store.num_failed, now_and_then
    pack_and_prepare("s3://bucket/flaky", local, tmp_path, pool=SerialPool())
    assert object_store.num_failed >= before + 5
    object_store.fault = None
    assert object_store.objects("flaky/") == contents(local / "shards")


@pytest.mark.slow
def test_a_store_that_stops_taking_writes_ends_prepare_with_the_shard_and_the_url(
    local, object_store, tmp_path, monkeypatch
):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    dataset = pack_folder(local / "images", "s3://bucket/stopped")
    object_store.fault = lambda method, path: 500 if method == "PUT" and path.endswith("train-000001.tar") else None
    with pytest.raises(StorageUnavailable) as caught:
        prepare_all(dataset, pool=LocalPool(2), report=tmp_path / "prepare.jsonl")
    assert str(caught.value).startswith("priors of s3://bucket/stopped/train-000001.tar: storage failed 4 times")
    assert "s3://bucket/stopped/priors/default/train-000001.tar" in str(caught.value)
    assert "priors/default/priors.json" not in object_store.objects("stopped/")
