"""Two pools at once: what one hands to the other, and how both end."""

import threading
from pathlib import Path

import pytest

from dpkd.launch.pool import LocalPool
from dpkd.stages.ahead import ahead
from tests.pool_work import note_and_wait, square
from tests.prior_cases import SerialPool


def test_an_item_is_handed_out_once_the_earlier_work_on_it_is_done():
    done, open_ = [], threading.Event()

    def work(number):
        if number == 2:
            assert open_.wait(20)
        done.append(number)

    with ahead("abc", pool=SerialPool(), function=work, earlier=range(3)) as items:
        assert (items[0], items[1]) == ("a", "b")
        assert 2 not in done
        open_.set()
        assert items[2] == "c"
        assert list(items) == ["a", "b", "c"]
        assert len(items) == 3
    assert done == [0, 1, 2]


def test_the_block_begins_when_the_first_item_is_done_and_at_once_without_items():
    done = []
    with ahead("ab", pool=SerialPool(), function=done.append, earlier=range(2)):
        assert done
    with ahead("", pool=SerialPool(), function=done.append, earlier=()) as items:
        assert list(items) == []


def test_an_error_of_the_earlier_work_is_raised_where_its_item_is_asked_for():
    def work(number):
        if number == 1:
            raise LookupError("one is missing")

    with ahead("abc", pool=SerialPool(), function=work, earlier=range(3)) as items:
        assert items[0] == "a"
        with pytest.raises(LookupError, match="one is missing"):
            list(items)


def test_an_error_of_the_block_ends_the_earlier_work_after_the_item_it_is_at():
    done, at_first, free = [], threading.Event(), threading.Event()

    def work(number):
        done.append(number)
        if number == 1:
            at_first.set()
            assert free.wait(20)

    def fail():
        with ahead("abcd", pool=SerialPool(), function=work, earlier=range(4)) as items:
            assert items[0] == "a"
            assert at_first.wait(20)
            threading.Timer(0.2, free.set).start()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert done == [0, 1]
    assert not [thread for thread in threading.enumerate() if thread.name == "dpkd-ahead"]


def test_an_error_of_the_block_ends_earlier_work_that_hangs(tmp_path):
    def fail():
        items = [(number, str(tmp_path)) for number in range(3)]
        with ahead("abc", pool=LocalPool(1), function=note_and_wait, earlier=items) as ahead_items:
            assert ahead_items[0] == "a"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not [thread for thread in threading.enumerate() if thread.name == "dpkd-ahead"]
    assert not [path for path in tmp_path.iterdir() if Path(f"/proc/{path.name}").exists()]


def test_two_pools_of_processes_work_at_once():
    with ahead([1, 2, 3], pool=LocalPool(1), function=square, earlier=[4, 5, 6]) as items:
        assert sorted(LocalPool(1).map(square, items)) == [(0, 1), (1, 4), (2, 9)]
