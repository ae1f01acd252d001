"""What only the local pool has: an environment of its own for each worker."""

from collections import Counter

from dpkd.pool import LocalPool
from tests.pool_work import name_device


def test_each_worker_has_an_environment_of_its_own_which_its_replacement_takes_over(tmp_path):
    pool = LocalPool(2, environments=[{"DEVICE": "first"}, {"DEVICE": "second"}])
    devices = dict(pool.map(name_device, [(number, str(tmp_path)) for number in range(8)]))
    assert set(devices.values()) == {"first", "second"}
    assert len(devices) == 8
    workers = Counter(path.name.partition("-")[0] for path in tmp_path.iterdir())
    assert sorted(workers.values()) == [1, 2]  # one died and was replaced
