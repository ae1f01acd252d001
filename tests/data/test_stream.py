"""Batches from real shards: the same whatever the number of workers, ranks and restarts."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest
import torch

from dpkd.data.augment import apply_image, random_views
from dpkd.data.batch import Batch
from dpkd.data.decoded import DecodedImages
from dpkd.data.images import decode_image, encode_png
from dpkd.data.order import Order, rank_micro_batches
from dpkd.data.sample import Sample
from dpkd.data.settings import AugmentSettings, LoaderSettings
from dpkd.data.shards import Dataset, Manifest, ShardIndex, ShardInfo, Split, SplitInfo, checksum, index_name
from dpkd.data.stream import ViewPlan, evaluation_batches, load_batches
from dpkd.data.tars import TarWriter
from dpkd.errors import UserError
from dpkd.launch.forking import ONE_THREAD

SHARD_SIZES = (5, 7, 4)
NUM_SAMPLES = sum(SHARD_SIZES)
HERE = LoaderSettings(workers=0)


class ImageAsMaps:
    """Reads maps that are the image itself, in colours and as labels, so that a batch shows what became of them."""

    num_channels = 4

    def read(self, i: int, sample: Sample) -> dict[str, np.ndarray]:
        image_HWC = decode_image(sample.image)
        return {"colour": image_HWC.astype(np.float32) / 255, "label": image_HWC[..., :1].astype(np.int32)}

    def nearest(self, name: str) -> bool:
        return name == "label"

    def flip(self, name: str, map_HWC: np.ndarray) -> np.ndarray:
        return map_HWC[:, ::-1]


class AnothersMaps(ImageAsMaps):
    """A reader whose maps never belong to the image."""

    def read(self, i: int, sample: Sample) -> dict[str, np.ndarray]:
        raise ValueError(f"the maps of {sample.key} were made from another image")


def _image(i: int) -> np.ndarray:
    """Waves of a colour and direction of their own; sizes differ."""
    y, x = np.mgrid[: 30 + i, : 36 + i % 3] / 12
    waves = np.stack([np.sin(x * (1 + i / 9)), np.cos(y + i), np.sin(x + y + i / 3)], axis=-1)
    return np.round(127.5 + 100 * waves).astype(np.uint8)


def _write_shard(folder: Path, name: str, samples: range) -> ShardInfo:
    keys = tuple(f"class/{i:03d}" for i in samples)
    members: dict[str, tuple[list[int], list[int]]] = {"png": ([], []), "json": ([], [])}
    checksums: list[int] = []
    with (folder / name).open("wb") as file:
        writer = TarWriter(file)
        for i, key in zip(samples, keys, strict=True):
            contents = {"png": encode_png(_image(i)), "json": json.dumps({"label": i % 3}).encode()}
            checksums.append(checksum(contents))
            for extension, data in contents.items():
                member = writer.add(f"{key}.{extension}", data)
                members[extension][0].append(member.offset)
                members[extension][1].append(member.size)
        writer.finish()
    data = (folder / name).read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    shard = ShardInfo(name=name, num_samples=len(keys), size_bytes=len(data), sha256=sha256)
    index = ShardIndex(
        keys=keys,
        label_N=np.array([i % 3 for i in samples]),
        members={name: (np.array(at), np.array(size)) for name, (at, size) in members.items()},
        shard=shard,
        checksum_N=np.array(checksums, np.uint32),
    )
    (folder / index_name(name)).write_bytes(index.to_bytes())
    return shard


@pytest.fixture
def split(tmp_path: Path) -> Split:
    ends = np.cumsum(SHARD_SIZES).tolist()
    shards = [
        _write_shard(tmp_path, f"train-{k:06d}.tar", range(end - size, end))
        for k, (end, size) in enumerate(zip(ends, SHARD_SIZES, strict=True))
    ]
    info = SplitInfo(num_samples=NUM_SAMPLES, num_unlabelled=0, class_counts=(6, 5, 5), shards=tuple(shards))
    manifest = Manifest(
        classes=("a", "b", "c"), splits={"train": info}, image_mean=(0.5,) * 3, image_std=(0.2,) * 3, made_from={}
    )
    (tmp_path / "dataset.json").write_bytes(manifest.to_bytes())
    return Dataset.open(str(tmp_path)).split("train")


def one_view(size: int, map_size: int, augment: AugmentSettings | None = None) -> dict[str, ViewPlan]:
    return {"global": ViewPlan(size, map_size, augment or AugmentSettings())}


def _train(
    split: Split, start: int, stop: int, *, loader=HERE, maps=None, rank=0, world_size=1, views=None
) -> list[Batch]:
    order = Order(split.shard_sizes, seed=5, global_batch_size=8, block_shards=2)
    batches = load_batches(
        split,
        rank_micro_batches(order, range(start, stop), rank=rank, world_size=world_size, micro_batch_size=2),
        targets={"class": split.label_N},
        maps=maps,
        views=views or one_view(24, 24),
        seed=5,
        loader=loader,
    )
    return list(batches)


def _one_rank(split: Split, steps: range, *, batch_size: int):
    order = Order(split.shard_sizes, seed=0, global_batch_size=batch_size, block_shards=3)
    return rank_micro_batches(order, steps, rank=0, world_size=1, micro_batch_size=batch_size)


def _assert_equal(found: list[Batch], expected: list[Batch]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.views.keys() == other.views.keys()
        for name, view in one.views.items():
            torch.testing.assert_close(view.image_BCHW, other.views[name].image_BCHW, rtol=0, atol=0)
            torch.testing.assert_close(view.maps, other.views[name].maps, rtol=0, atol=0)
        torch.testing.assert_close(one.targets, other.targets, rtol=0, atol=0)
        torch.testing.assert_close((one.index_B, one.epoch_B), (other.index_B, other.epoch_B), rtol=0, atol=0)


def test_a_batch_holds_the_samples_and_views_that_order_and_seed_say(split):
    batch = _train(split, 3, 4)[1]
    order = Order(SHARD_SIZES, seed=5, global_batch_size=8, block_shards=2)
    assert batch.index_B.tolist() == order.batch(3)[2:4].tolist()
    assert batch.epoch_B.tolist() == order.epochs_of(3)[2:4].tolist()
    assert batch.targets["class"].tolist() == [i % 3 for i in batch.index_B.tolist()]
    for image_CHW, index, epoch in zip(
        batch.views["global"].image_BCHW, batch.index_B.tolist(), batch.epoch_B.tolist(), strict=True
    ):
        (view,) = random_views([AugmentSettings()], _image(index).shape[:2], seed=5, epoch=epoch, index=index)
        expected = apply_image(view, _image(index), size=24)
        np.testing.assert_array_equal(image_CHW.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(split, workers):
    maps = ImageAsMaps()
    expected = _train(split, 0, 5, maps=maps)
    _assert_equal(_train(split, 0, 5, maps=maps, loader=LoaderSettings(workers=workers, prefetch=2)), expected)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kept_bytes", [10**6, 20_000])  # all images, and some of them
@pytest.mark.parametrize("maps", [None, ImageAsMaps()])
def test_kept_images_change_nothing(split, workers, kept_bytes, maps):
    loader = LoaderSettings(workers=workers, cache_gb=kept_bytes / 1e9)
    _assert_equal(_train(split, 0, 9, maps=maps, loader=loader), _train(split, 0, 9, maps=maps))


def test_kept_images_are_not_read_again(split, tmp_path):
    expected = _train(split, 0, 6)
    order = Order(SHARD_SIZES, seed=5, global_batch_size=8, block_shards=2)
    batches = load_batches(
        split,
        rank_micro_batches(order, range(6), rank=0, world_size=1, micro_batch_size=2),
        targets={"class": split.label_N},
        maps=None,
        views=one_view(24, 24),
        seed=5,
        loader=LoaderSettings(workers=0, cache_gb=1e-3),
    )
    first = [next(batches) for _ in range(8)]  # the first epoch
    for shard in tmp_path.glob("*.tar"):
        with shard.open("r+b") as file:
            file.write(bytes(shard.stat().st_size))
    _assert_equal([*first, *batches], expected)


def test_an_image_that_does_not_fit_is_not_kept_and_a_smaller_one_still_is(split):
    images = [np.full((side, side, 3), side, np.uint8) for side in (10, 20, 5)]
    decoded = DecodedImages(split.num_samples, num_bytes=3 * (10 * 10 + 5 * 5), lock=nullcontext())
    for index, image_HWC in enumerate(images):
        decoded.keep(index, image_HWC)
    np.testing.assert_array_equal(decoded.get(0), images[0])
    assert decoded.get(1) is None
    np.testing.assert_array_equal(decoded.get(2), images[2])


def test_more_memory_than_the_machine_shares_is_refused(split):
    with pytest.raises(UserError, match=r"data\.loader\.cache_gb asks for 1000000\.0 GB .* lower it"):
        _train(split, 0, 1, loader=LoaderSettings(workers=0, cache_gb=1e6))


def test_without_room_in_the_shared_memory_the_training_process_reads(split: Split, capsys) -> None:
    maps = ImageAsMaps()
    loader = LoaderSettings(workers=1, prefetch=10**12)
    _assert_equal(_train(split, 0, 2, maps=maps, loader=loader), _train(split, 0, 2, maps=maps, loader=HERE))
    assert "/dev/shm has" in capsys.readouterr().out


def test_resuming_gives_the_rest_of_the_batches(split):
    _assert_equal(_train(split, 3, 6), _train(split, 0, 6)[12:])


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_see_the_batches_of_one(split, world_size):
    ranks = [_train(split, 0, 3, rank=rank, world_size=world_size) for rank in range(world_size)]
    dealt = [batch for turn in zip(*ranks, strict=True) for batch in turn]
    _assert_equal(dealt, _train(split, 0, 3))


def test_maps_follow_their_images(split):
    plain = AugmentSettings(brightness=0, contrast=0, saturation=0)
    draws = _one_rank(split, range(1), batch_size=NUM_SAMPLES)
    views = one_view(24, 24, plain)
    targets = {"class": split.label_N}
    (batch,) = load_batches(split, draws, targets=targets, maps=ImageAsMaps(), views=views, seed=0, loader=HERE)
    image_BCHW = batch.views["global"].image_BCHW.float() / 255
    assert batch.views["global"].maps["colour"].shape == image_BCHW.shape
    assert batch.views["global"].maps["label"].shape == (NUM_SAMPLES, 1, 24, 24)
    assert (batch.views["global"].maps["colour"] - image_BCHW).abs().mean() < 0.01
    assert (batch.views["global"].maps["label"][:, 0] / 255 - image_BCHW[:, 0]).abs().mean() < 0.05
    others = batch.views["global"].maps["colour"].roll(1, dims=0)  # what the wrong map would give
    assert (others - image_BCHW).abs().mean() > 0.1


def test_hidden_labels_stay_hidden_in_training_and_show_in_evaluation(split):
    hidden = np.full(NUM_SAMPLES, -1)
    draws = _one_rank(split, range(2), batch_size=4)
    batches = load_batches(
        split, draws, targets={"class": hidden}, maps=None, views=one_view(16, 4), seed=0, loader=HERE
    )
    assert all(batch.targets["class"].tolist() == [-1] * 4 for batch in batches)
    shown = list(_evaluate(split, np.arange(NUM_SAMPLES)))
    assert torch.cat([batch.targets["class"] for batch in shown]).tolist() == [i % 3 for i in range(NUM_SAMPLES)]


def _evaluate(split: Split, indices: np.ndarray, *, loader=HERE, batch_size=6):
    return evaluation_batches(
        split, indices=indices, maps=ImageAsMaps(), image_size=20, map_size=5, batch_size=batch_size, loader=loader
    )


def test_evaluation_gives_what_it_was_asked_for_in_that_order(split):
    indices = np.array([3, 15, 0, 0, 9])
    batches = list(_evaluate(split, indices, batch_size=2))
    assert [len(batch.index_B) for batch in batches] == [2, 2, 1]
    assert torch.cat([batch.index_B for batch in batches]).tolist() == indices.tolist()
    torch.testing.assert_close(batches[1].views["global"].image_BCHW[0], batches[1].views["global"].image_BCHW[1])
    assert not list(_evaluate(split, indices[:0]))


def test_the_loader_leaves_torchs_random_state_alone(split):
    before = torch.get_rng_state()
    _train(split, 0, 2)
    list(_evaluate(split, np.arange(4), loader=LoaderSettings(workers=1)))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_sample_names_its_shard_and_key_in_one_line(split, workers):
    shard = Path(split.url) / "train-000001.tar"
    data = bytearray(shard.read_bytes())
    at, size = (int(column[2]) for column in split.index(1).members["png"])
    data[at : at + size] = bytes(size)
    shard.write_bytes(data)
    loader = LoaderSettings(workers=workers)
    with pytest.raises(UserError, match=r"train-000001\.tar, sample 'class/007': .*image") as caught:
        list(_evaluate(split, np.arange(NUM_SAMPLES), loader=loader))
    assert "Traceback" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_maps_of_another_image_stop_training_by_name(split):
    with pytest.raises(UserError, match=r"sample 'class/\d+': the maps .* another image"):
        _train(split, 0, 1, maps=AnothersMaps())


def test_a_batch_moves_as_a_whole(split):
    batch = _train(split, 0, 1, maps=ImageAsMaps())[0]
    moved = batch.to("meta")
    view = moved.views["global"]
    tensors = [view.image_BCHW, *moved.targets.values(), moved.index_B, moved.epoch_B, *view.maps.values()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert set(view.maps) == {"colour", "label"}


def test_views_of_several_kinds_and_sizes_come_in_blocks_and_leave_the_global_view_as_it_is(split):
    views = one_view(24, 24) | {"local": ViewPlan(16, 4, AugmentSettings(crop_scale=(0.05, 0.3)), count=3)}
    batches, alone = (_train(split, 0, 2, maps=ImageAsMaps(), views=each) for each in (views, one_view(24, 24)))
    for batch, single in zip(batches, alone, strict=True):
        local = batch.views["local"]
        assert local.image_BCHW.shape == (3 * 2, 3, 16, 16)
        assert local.maps["label"].shape == (3 * 2, 1, 4, 4)
        _assert_equal([replace(batch, views={"global": batch.views["global"]})], [single])
        blocks = local.image_BCHW.float().view(3, 2, 3, 16, 16) / 255
        colour = torch.nn.functional.interpolate(local.maps["colour"], size=16).view_as(blocks)
        assert (blocks[0] - blocks[1]).abs().mean() > 0.02  # other crops
        plain = (blocks - colour).abs().mean()
        assert plain < (blocks - colour.roll(1, dims=1)).abs().mean()  # each with the maps of its own image


def test_shifted_maps_are_those_of_another_image(split):
    batch = _train(split, 0, 1, maps=ImageAsMaps())[0]
    shifted = batch.with_shifted_maps()
    assert torch.equal(shifted.views["global"].image_BCHW, batch.views["global"].image_BCHW)
    for name, map_BCHW in batch.views["global"].maps.items():
        assert torch.equal(shifted.views["global"].maps[name], map_BCHW.roll(1, dims=0))


_TRAINER = """
import sys, numpy as np
from dpkd.data.settings import LoaderSettings
from dpkd.data.shards import Dataset
from dpkd.data.stream import evaluation_batches

if __name__ == "__main__":
    split = Dataset.open(sys.argv[1]).split("train")
    batches = evaluation_batches(
        split, indices=np.zeros(100_000, np.int64), maps=None, image_size=16, map_size=4, batch_size=2,
        loader=LoaderSettings(workers=2),
    )
    for number, _ in enumerate(batches):
        print(number, flush=True)
        sys.stdin.readline()
"""


@pytest.fixture
def trainer(split: Split, tmp_path: Path):
    """A process that asks its two workers for a batch at every line it reads, in a process group of its own."""
    script = tmp_path / "trainer.py"
    script.write_text(_TRAINER)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, script, split.url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdout.readline()  # a batch of the one worker, then of the other: both are up
    process.stdin.write("\n")
    process.stdin.flush()
    process.stdout.readline()
    yield process
    process.kill()
    process.communicate()


def test_workers_outlive_a_request_to_stop_but_not_their_trainer(trainer):
    """Ctrl-C and a scheduler's SIGTERM reach every process; the trainer decides, and may need batches until then."""
    helpers = psutil.Process(trainer.pid).children(recursive=True)
    workers = [helper for helper in helpers if helper.ppid() != trainer.pid]
    assert len(workers) == 2
    for worker in workers:
        worker.send_signal(signal.SIGINT)
        worker.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    for number in range(2, 30):
        trainer.stdin.write("\n")
        trainer.stdin.flush()
        assert trainer.stdout.readline() == f"{number}\n"
    trainer.kill()
    assert not psutil.wait_procs(helpers, timeout=20)[1]


_RESTARTER = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: None)
import numpy as np
from dpkd.data.settings import LoaderSettings
from dpkd.data.shards import Dataset
from dpkd.data.stream import evaluation_batches

if __name__ == "__main__":
    print("up", flush=True)
    split = Dataset.open(sys.argv[1]).split("train")
    for _ in range(4):
        batches = evaluation_batches(
            split, indices=np.arange(16), maps=None, image_size=16, map_size=4, batch_size=2,
            loader=LoaderSettings(workers=2),
        )
        assert len(list(batches)) == 8
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Python itself ends its handlers with the script
"""


def test_loaders_start_and_work_while_the_whole_group_is_asked_to_stop(split, tmp_path):
    script = tmp_path / "restarter.py"
    script.write_text(_RESTARTER)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, script, split.url]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    assert process.stdout is not None
    process.stdout.readline()
    while process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        time.sleep(0.01)
    assert process.returncode == 0


_THREADS = """
import os
import numpy as np
from dpkd.data.settings import LoaderSettings
from dpkd.data.shards import Dataset
from dpkd.data.stream import evaluation_batches, load_ahead
from dpkd.launch.forking import ONE_THREAD
from tests.pool_work import num_threads

class ThreadsAsMaps:
    num_channels = 1

    def read(self, i, sample):
        counts = [int(os.environ[name]) for name in ONE_THREAD] + num_threads(None)
        return {"threads": np.full((1, 1, 1), max(counts), np.float32)}
    def nearest(self, name):
        return True
    def flip(self, name, map_HWC):
        return map_HWC

if __name__ == "__main__":
    import sys
    if sys.argv[2] == "ahead":
        load_ahead()
    split = Dataset.open(sys.argv[1]).split("train")
    batches = evaluation_batches(
        split, indices=np.arange(8), maps=ThreadsAsMaps(), image_size=16, map_size=4, batch_size=2,
        loader=LoaderSettings(workers=2),
    )
    seen = {int(batch.views["global"].maps["threads"].max()) for batch in batches}
    print(seen, {os.environ.get(name) for name in ONE_THREAD})
"""


@pytest.mark.parametrize("start", ["ahead", "with the loader"])
def test_loader_workers_compute_with_one_thread_and_leave_the_trainer_its_own(split, tmp_path, start):
    script = tmp_path / "threads.py"
    script.write_text(_THREADS)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])} | dict.fromkeys(ONE_THREAD, "2")
    command = [sys.executable, script, split.url, start]
    printed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    assert printed == "{1} {'2'}\n"
