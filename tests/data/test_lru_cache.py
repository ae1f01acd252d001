import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from dpkd.io.shard_cache import MAX_FILES, LRUCache
from dpkd.priors.catalogue.orientation import Hog
from tests.data.packing import make_folder, pack_at
from tests.prior_cases import prepare_all

NUM_SHARDS = 2 * MAX_FILES + 10


@contextmanager
def files_open_at_most(count: int) -> Iterator[None]:
    """Within, this process may open `count` files beside those that are open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    last = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (last + count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_value_not_used_for_longest_is_let_go_and_all_at_the_end():
    gone: list[str] = []
    recent: LRUCache[str] = LRUCache(2, on_evict=gone.append)
    assert [recent.get(number, str) for number in (1, 2, 1, 3)] == ["1", "2", "1", "3"]
    assert gone == ["2"]
    recent.get(2, str)
    assert gone == ["2", "1"]
    del recent
    assert gone == ["2", "1", "3", "2"]


def test_a_value_that_cannot_be_made_leaves_nothing_behind():
    recent: LRUCache[float] = LRUCache(2)
    try:
        recent.get(0, lambda number: 1 / number)
    except ZeroDivisionError:
        pass
    assert recent.get(0, float) == 0.0


def test_more_shards_than_a_process_may_open_are_read(tmp_path):
    source = make_folder(tmp_path / "images", counts={"train/a": NUM_SHARDS})
    dataset = pack_at(source, tmp_path / "shards", samples_per_shard=1)
    priors = prepare_all(dataset, priors=(Hog(),))
    assert len(dataset.manifest.splits["train"].shards) == NUM_SHARDS
    split, maps = dataset.split("train"), priors.split("train")
    keys = split.keys
    order = np.random.default_rng(0).permutation(NUM_SHARDS).tolist()
    with files_open_at_most(2 * MAX_FILES + 5):
        for i in [*order, *order]:
            sample = split.read(i)
            assert sample.key == keys[i]
            assert set(maps.read(i, sample)) == {"hog"}
