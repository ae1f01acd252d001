"""What every pool keeps: one set of tests over the local pool and the Ray pool."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from dpkd.backends.local_pool import LocalPool
from dpkd.backends.ray_pool import RayPool
from dpkd.errors import StorageUnavailable, UserError, WorkerFailed
from dpkd.launch.pool import NUM_RETRIES, Pool
from dpkd.launch.watchdog import WatchOrder
from tests.pool_work import (
    fail_at_first,
    hang_first_worker,
    kill_first_worker,
    kill_worker,
    name_folder,
    name_process,
    note_and_wait,
    num_threads,
    refuse_file,
    refuse_three,
    return_function,
    square,
)

pytestmark = pytest.mark.serial


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.slow)])
def pool(request: pytest.FixtureRequest, tmp_path: Path) -> Pool:
    order = WatchOrder.begin(tmp_path / "hangs", hang_timeout_s=1.0)
    if request.param == "local":
        return LocalPool(2, order=order)
    request.getfixturevalue("ray_connection")
    return RayPool(2, order=order)


ON_RAY_IN_CHAOS = pytest.mark.parametrize(
    "pool", ["local", pytest.param("ray", marks=pytest.mark.chaos)], indirect=True
)
"""CI does without those that take long there and differ little from others."""


def test_every_item_is_answered_once_under_its_index(pool):
    assert sorted(pool.map(square, range(7, 17))) == [(index, (index + 7) ** 2) for index in range(10)]


def test_large_items_and_results_pass(pool):
    arrays = [np.full(1_000_000, index, np.float32) for index in range(3)]
    results = dict(pool.map(square, arrays))
    assert [float(results[index].sum()) for index in range(3)] == [0.0, 1e6, 4e6]


def test_no_items_need_no_workers(pool):
    assert list(pool.map(square, [])) == []


def test_an_error_of_the_function_comes_out_unchanged_with_its_traceback(pool):
    with pytest.raises(UserError, match="three is not allowed") as caught:
        list(pool.map(refuse_three, range(10)))
    assert "refuse_three" in str(caught.value.__cause__)


def test_a_result_that_does_not_pickle_is_an_error(pool):
    with pytest.raises((AttributeError, RuntimeError, TypeError), match=r"pickle|local object"):
        list(pool.map(return_function, [1]))


def test_an_item_whose_worker_was_killed_is_done_by_another(pool, tmp_path):
    answers = sorted(pool.map(kill_first_worker, [(number, str(tmp_path)) for number in range(10)]))
    assert answers == [(number, number) for number in range(10)]
    assert (tmp_path / "3").exists()


@ON_RAY_IN_CHAOS
@pytest.mark.parametrize("how", ["stopped", "waiting"])
def test_an_item_whose_worker_hangs_is_done_by_another(pool, tmp_path, caplog, how):
    answers = sorted(pool.map(hang_first_worker, [(number, str(tmp_path), how) for number in range(5)]))
    assert answers == [(number, number) for number in range(5)]
    told = "stopped by a signal" if how == "stopped" else "pool_work.py:"
    assert f"hung: no sign of life for 6 s in item, step 0, {told}" in caplog.text.replace("at tests/", "")
    (report,) = (tmp_path / "hangs").iterdir()
    assert ("in hang_first_worker" in report.read_text()) == (how == "waiting")


@ON_RAY_IN_CHAOS
def test_a_worker_that_is_stopped_between_two_items_is_followed_by_another(pool):
    answers = pool.map(name_process, range(6))
    _, process = next(answers)
    os.kill(process, signal.SIGSTOP)
    others = {other for _, other in answers if other != process}
    assert others
    assert not Path(f"/proc/{process}").exists()


@ON_RAY_IN_CHAOS
def test_a_worker_may_wait_for_its_next_item_as_long_as_it_likes(pool, tmp_path):
    answers = pool.map(name_process, range(5))
    _, process = next(answers)
    time.sleep(8)
    assert process in {other for _, other in answers}
    assert not (tmp_path / "hangs").exists()


def test_an_item_that_kills_every_worker_is_named(pool):
    with pytest.raises(WorkerFailed, match=r"item 2: 3"):
        list(pool.map(kill_worker, range(1, 8)))


def test_workers_end_when_the_iterator_is_closed(pool, tmp_path):
    answers = pool.map(note_and_wait, [(number, str(tmp_path)) for number in range(4)])
    assert next(answers) == (0, 0)
    answers.close()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{path.name}").exists() for path in tmp_path.iterdir()):
        assert time.monotonic() < deadline, "a worker is still there"
        time.sleep(0.1)


def test_relative_paths_mean_the_same_in_workers(pool):
    assert list(pool.map(name_folder, [0])) == [(0, str(Path.cwd()))]


def test_an_item_whose_storage_fails_is_done_once_more(pool, tmp_path):
    items = [(number, str(tmp_path), 2) for number in range(5)]
    assert sorted(pool.map(fail_at_first, items)) == [(number, number) for number in range(5)]
    assert len(list((tmp_path / "3").iterdir())) == 3
    assert len(list((tmp_path / "2").iterdir())) == 1


@ON_RAY_IN_CHAOS
def test_an_item_whose_storage_always_fails_is_named_with_the_last_error(pool, tmp_path):
    with pytest.raises(StorageUnavailable, match=rf"\(3, .*: storage failed {NUM_RETRIES + 1} times, .*s3://bucket: b"):
        list(pool.map(fail_at_first, [(number, str(tmp_path), 99) for number in range(5)]))
    assert len(list((tmp_path / "3").iterdir())) == NUM_RETRIES + 1


def test_a_file_that_is_missing_is_not_asked_for_again(pool, tmp_path):
    with pytest.raises(FileNotFoundError, match="no file 0"):
        list(pool.map(refuse_file, [(0, str(tmp_path))]))
    assert len(list(tmp_path.iterdir())) == 1


def test_workers_compute_with_one_thread(pool):
    assert {count for _, counts in pool.map(num_threads, [0]) for count in counts} == {1}
