"""The order of samples: nothing lost, nothing twice, the same wherever and however often it is asked for."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpkd.data.order import ClassAwareOrder, Order, OrderWithout, SampleOrder, rank_slice
from dpkd.errors import UserError
from dpkd.rng import Purpose, bits

SHARD_SIZES = st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(any)
SEEDS = st.integers(0, 2**40)


def _stream(order: SampleOrder, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` samples and their epochs."""
    steps = range(-(-count // order.global_batch_size))
    return (
        np.concatenate([order.batch(step) for step in steps])[:count],
        np.concatenate([order.epochs_of(step) for step in steps])[:count],
    )


@settings(max_examples=60, deadline=None)
@given(SHARD_SIZES, SEEDS, st.integers(1, 30), st.integers(1, 10))
def test_every_epoch_shows_every_sample_once(shard_sizes, seed, batch_size, block_shards):
    order = Order(shard_sizes, seed=seed, global_batch_size=batch_size, block_shards=block_shards)
    samples, epochs = _stream(order, 3 * order.num_samples)
    for seen in np.split(samples, 3):
        assert sorted(seen) == list(range(order.num_samples))
    assert epochs.tolist() == np.repeat(np.arange(3), order.num_samples).tolist()


@settings(max_examples=60, deadline=None)
@given(SHARD_SIZES, SEEDS, st.integers(1, 5))
def test_a_block_of_shards_is_finished_before_the_next_begins(shard_sizes, seed, block_shards):
    order = Order(shard_sizes, seed=seed, global_batch_size=1, block_shards=block_shards)
    shard_of = np.repeat(np.arange(len(shard_sizes)), shard_sizes)
    shards = shard_of[_stream(order, order.num_samples)[0]]
    place = 0
    while place < len(shards):
        block = list(dict.fromkeys(shards[place:].tolist()))[:block_shards]
        end = place + sum(shard_sizes[shard] for shard in block)
        assert set(shards[place:end].tolist()) == set(block)
        place = end


@pytest.mark.parametrize("kind", ["uniform", "class_aware"])
@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(1, 9), st.integers(0, 20))
def test_resuming_at_any_step_gives_the_rest_of_the_sequence(kind, seed, batch_size, start):
    label_N = np.array([0, 0, 0, 1, -1, 2, 2, -1, 0, 1, 5])

    def new() -> SampleOrder:
        if kind == "uniform":
            return Order([4, 7], seed=seed, global_batch_size=batch_size, block_shards=1)
        return ClassAwareOrder(label_N, seed=seed, global_batch_size=batch_size)

    unbroken, resumed = new(), new()
    whole = [unbroken.batch(step) for step in range(start + 5)]
    for step in range(start, start + 5):
        np.testing.assert_array_equal(resumed.batch(step), whole[step])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.sampled_from([1, 2, 3, 4, 6]), st.integers(1, 5))
def test_micro_batches_do_not_depend_on_the_world_size(rounds, world_size, micro_batch_size):
    batch = np.arange(12 * rounds * micro_batch_size)
    expected = batch.reshape(-1, micro_batch_size)
    found = [
        rank_slice(batch, rank=rank, world_size=world_size, micro_batch_size=micro_batch_size)
        for rank in range(world_size)
    ]
    dealt = np.stack(found, axis=1).reshape(-1, micro_batch_size)  # the k-th of every rank, then the next
    np.testing.assert_array_equal(dealt, expected)


def test_a_batch_that_cannot_be_cut_evenly_names_the_settings():
    with pytest.raises(UserError, match=r"training\.batch_size 10 .* micro-batches of 4 on 2 workers.*multiple of 8"):
        rank_slice(np.arange(10), rank=0, world_size=2, micro_batch_size=4)


def test_epochs_and_seeds_differ():
    def epochs(seed: int) -> list[list[int]]:
        order = Order([40, 40], seed=seed, global_batch_size=80, block_shards=2)
        return [order.batch(step).tolist() for step in range(2)]

    orders = epochs(0) + epochs(1)
    assert len({tuple(order) for order in orders}) == 4


def test_the_order_never_changes_between_versions():
    """A run resumed under another release must go on with the order it began with."""
    order = Order([5, 3, 9, 1], seed=7, global_batch_size=6, block_shards=2)
    drawn = np.stack([order.batch(step) for step in range(6)]).astype("<i8")
    assert hashlib.sha256(drawn.tobytes()).hexdigest()[:16] == "96d787714d6c6826"
    assert bits(2, seed=1, purpose=Purpose.VIEWS, place=(2, 3)).tolist() == [13956106734563358825, 5503689825637358871]


def test_memory_does_not_grow_with_the_split():
    """A hundred million samples in ten thousand shards: a batch is drawn from one block."""
    order = Order([10_000] * 10_000, seed=0, global_batch_size=4096, block_shards=2)
    assert order.batch(20_000).max() < 10**8
    assert sum(len(order._block(0, block)) for block in (0, 1)) == 40_000
    assert order._block.cache_info().currsize <= 2


def test_an_empty_split_is_the_users_error():
    with pytest.raises(UserError, match="without samples"):
        Order([0, 0], seed=0, global_batch_size=2, block_shards=1)


LABELS = st.lists(st.integers(-1, 4), min_size=1, max_size=40).map(np.array)


@settings(max_examples=60, deadline=None)
@given(LABELS, SEEDS, st.integers(1, 9))
def test_class_aware_order_shows_classes_equally_often(label_N, seed, batch_size):
    order = ClassAwareOrder(label_N, seed=seed, global_batch_size=batch_size)
    drawn = label_N[_stream(order, 200)[0]]
    counts = [np.count_nonzero(drawn == label) for label in np.unique(label_N[label_N >= 0])]
    if counts:
        assert max(counts) - min(counts) <= 1


@settings(max_examples=60, deadline=None)
@given(LABELS, SEEDS)
def test_class_aware_order_keeps_the_share_of_unlabelled_samples(label_N, seed):
    order = ClassAwareOrder(label_N, seed=seed, global_batch_size=7)
    for count in (len(label_N), 3 * len(label_N)):
        drawn = label_N[_stream(order, count)[0]]
        assert np.count_nonzero(drawn < 0) * len(label_N) == np.count_nonzero(label_N < 0) * count


@settings(max_examples=60, deadline=None)
@given(LABELS, SEEDS)
def test_class_aware_order_shows_all_of_a_class_before_any_again(label_N, seed):
    samples, epochs = _stream(ClassAwareOrder(label_N, seed=seed, global_batch_size=5), 300)
    drawn_before = dict.fromkeys(range(len(label_N)), 0)
    for sample, epoch in zip(samples.tolist(), epochs.tolist(), strict=True):
        members = np.flatnonzero(label_N == label_N[sample]).tolist()
        assert drawn_before[sample] == epoch == min(drawn_before[member] for member in members)
        drawn_before[sample] += 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=60).filter(any), SEEDS, st.integers(1, 9))
def test_an_order_without_some_samples_shows_the_others_by_their_own_numbers(kept, seed, batch_size):
    numbers, left_out = np.flatnonzero(kept), np.flatnonzero(~np.array(kept))
    inner = Order([len(numbers)], seed=seed, global_batch_size=batch_size, block_shards=1)
    order = OrderWithout(inner, left_out)
    assert (order.num_samples, order.global_batch_size) == (len(numbers), batch_size)
    for step in range(3):
        np.testing.assert_array_equal(order.batch(step), numbers[inner.batch(step)])
        np.testing.assert_array_equal(order.epochs_of(step), inner.epochs_of(step))
    samples, _ = _stream(order, 2 * len(numbers))
    for seen in np.split(samples, 2):
        assert sorted(seen) == numbers.tolist()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-1, 4), min_size=2, max_size=40).map(lambda labels: np.array([-1, 0, *labels])), SEEDS)
def test_labelled_samples_have_the_given_share_of_each_batch(label_N, seed):
    order = ClassAwareOrder(label_N, seed=seed, global_batch_size=8, labelled_share=0.75)
    for step in range(5):
        assert np.count_nonzero(label_N[order.batch(step)] >= 0) == 6
    only_labelled = ClassAwareOrder(np.zeros(5, np.int64), seed=seed, global_batch_size=8, labelled_share=0.75)
    assert only_labelled.batch(0).max() < 5
