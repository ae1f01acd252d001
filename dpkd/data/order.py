"""The samples of global batch `s`: a pure function of (seed, s), independent of the number of ranks or loader workers.

Positions 0, 1, 2 … of an endless sequence are cut into global batches, so the data position of a run is one integer,
the step. A batch may span two epochs; no sample is dropped or repeated within an epoch. Axes: B samples of a global
batch, M micro-batches of a rank, N samples of the split, K classes.

`Order` shuffles the shards of each epoch, cuts them into blocks of `block_shards`, and shuffles the samples of a block.
So remote shards stream, and memory holds the permutation of a block, not of a split of ten million samples.

An order has no unreadable samples: `OrderWithout` converts its numbers to those of the whole split.
"""

from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from functools import lru_cache, partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dpkd.errors import UserError
from dpkd.rng import Purpose, permutation

Indices = NDArray[np.int64]

_NUM_CACHED = 2
"""Cached blocks and epochs: a batch seldom needs more."""


class SampleOrder(Protocol):
    """The methods of an order that training uses."""

    num_samples: int
    global_batch_size: int

    def batch(self, step: int) -> Indices:
        """The samples [B] of this step, as indices into the split."""

    def epochs_of(self, step: int) -> Indices:
        """How many times each sample [B] of this step was drawn before."""


class Order:
    """Every sample once an epoch, in a new order each epoch."""

    def __init__(self, shard_sizes: Sequence[int], *, seed: int, global_batch_size: int, block_shards: int) -> None:
        self.shard_sizes = np.asarray(shard_sizes, np.int64)
        self.num_samples = int(self.shard_sizes.sum())
        self.global_batch_size = global_batch_size
        _require_samples(self.num_samples)
        self._seed = seed
        self._block_shards = block_shards
        self._shard_start = np.concatenate([[0], np.cumsum(self.shard_sizes)])
        self._epoch = lru_cache(_NUM_CACHED)(self._draw_epoch)
        self._block = lru_cache(_NUM_CACHED)(self._draw_block)

    def batch(self, step: int) -> Indices:
        """The samples [B] of this step, as indices into the split's shards laid end to end."""
        first = step * self.global_batch_size
        parts, missing = [], self.global_batch_size
        while missing:
            epoch, offset = divmod(first + self.global_batch_size - missing, self.num_samples)
            _, block_start = self._epoch(epoch)
            block = int(np.searchsorted(block_start, offset, side="right")) - 1
            offset -= int(block_start[block])
            parts.append(self._block(epoch, block)[offset : offset + missing])
            missing -= len(parts[-1])
        return np.concatenate(parts)

    def epochs_of(self, step: int) -> Indices:
        """The epoch of each sample [B] of this step."""
        return _positions(step, self.global_batch_size) // self.num_samples

    def _draw_epoch(self, epoch: int) -> tuple[Indices, Indices]:
        """The shards in the order of this epoch; the start of each of its blocks, and the end of the last."""
        shards = permutation(len(self.shard_sizes), seed=self._seed, purpose=Purpose.SHARDS, place=(epoch, 0))
        shards = shards[self.shard_sizes[shards] > 0]
        ends = np.cumsum(self.shard_sizes[shards])
        block_ends = np.append(ends[self._block_shards - 1 : -1 : self._block_shards], ends[-1])
        return shards, np.concatenate([[0], block_ends])

    def _draw_block(self, epoch: int, block: int) -> Indices:
        shards, start = self._epoch(epoch)[0], block * self._block_shards
        chosen = shards[start : start + self._block_shards]
        samples = np.concatenate([np.arange(self._shard_start[k], self._shard_start[k + 1]) for k in chosen])
        return samples[permutation(len(samples), seed=self._seed, purpose=Purpose.SAMPLES, place=(epoch, block))]


class ClassAwareOrder:
    """All classes equally often; a sample of a class repeats only after all other samples of the class.

    The sequence consists of rounds: each round has every class once, in a new order. Samples without a label (-1) keep
    their share of the split, spread evenly, so a batch has the same expected number of labels as with `Order`; or
    `labelled_share`, which is rounded to a fraction with a denominator up to 1,000, is the share of the labelled ones.
    """

    def __init__(
        self,
        label_N: NDArray[np.signedinteger],
        *,
        seed: int,
        global_batch_size: int,
        labelled_share: float | None = None,
    ) -> None:
        _require_samples(len(label_N))
        self.num_samples = len(label_N)
        self.global_batch_size = global_batch_size
        self._seed = seed
        # int32 halves the memory of large splits
        narrow: type[np.integer] = np.int32 if len(label_N) < 2**31 else np.int64
        by_class = np.argsort(label_N, kind="stable").astype(narrow)
        count_of = np.bincount(label_N + 1)  # from label -1 on
        labels = np.flatnonzero(count_of) - 1
        members = np.split(by_class, np.cumsum(count_of[labels + 1])[:-1])
        self._unlabelled = members.pop(0) if labels[0] < 0 else by_class[:0]
        share = Fraction(len(self._unlabelled), self.num_samples)
        if labelled_share is not None:
            share = 1 - Fraction(labelled_share).limit_denominator(1000)
        self._unlabelled_share = share if len(self._unlabelled) else Fraction(0)
        self._members = members
        self._label_K = labels[labels >= 0]
        self._shuffles: dict[int, tuple[int, NDArray[np.integer]]] = {}
        self._round = lru_cache(_NUM_CACHED)(self._draw_round)
        self._step = lru_cache(_NUM_CACHED)(self._draw_step)

    def batch(self, step: int) -> Indices:
        """The samples [B] of this step, as indices into the split."""
        return self._step(step)[0]

    def epochs_of(self, step: int) -> Indices:
        """How many times each sample [B] of this step was drawn before."""
        return self._step(step)[1]

    def _draw_step(self, step: int) -> tuple[Indices, Indices]:
        drawn = [self._at(int(position)) for position in _positions(step, self.global_batch_size)]
        pairs = np.array(drawn, np.int64)
        return pairs[:, 0], pairs[:, 1]

    def _at(self, position: int) -> tuple[int, int]:
        """The sample at a position of the endless sequence, and its number of earlier draws."""
        share = self._unlabelled_share
        before = position * share.numerator // share.denominator
        if (position + 1) * share.numerator // share.denominator > before:
            return self._nth(-1, self._unlabelled, before)
        turn, place = divmod(position - before, len(self._members))
        slot = int(self._round(turn)[place])
        return self._nth(int(self._label_K[slot]), self._members[slot], turn)

    def _nth(self, label: int, members: NDArray[np.integer], draw: int) -> tuple[int, int]:
        """The sample of the n-th draw from a class, and its number of earlier draws."""
        epoch, place = divmod(draw, len(members))
        if self._shuffles.get(label, (-1,))[0] != epoch:
            order = permutation(len(members), seed=self._seed, purpose=Purpose.SAMPLES, place=(epoch, label + 1))
            self._shuffles[label] = (epoch, members[order])
        return int(self._shuffles[label][1][place]), epoch

    def _draw_round(self, turn: int) -> Indices:
        return permutation(len(self._members), seed=self._seed, purpose=Purpose.CLASSES, place=(turn, 0))


class OrderWithout:
    """An order of the split without some samples; the indices count the whole split."""

    def __init__(self, order: SampleOrder, left_out: Indices) -> None:
        """`order` numbers the remaining samples from 0; `left_out` is ascending."""
        self.num_samples = order.num_samples
        self.global_batch_size = order.global_batch_size
        self._order = order
        # number of remaining samples before each left-out one: from there on, the number in the whole split is larger
        self._num_before = left_out - np.arange(len(left_out))

    def batch(self, step: int) -> Indices:
        """The samples [B] of this step, as indices into the split."""
        index_B = self._order.batch(step)
        return index_B + np.searchsorted(self._num_before, index_B, side="right")

    def epochs_of(self, step: int) -> Indices:
        """How many times each sample [B] of this step was drawn before."""
        return self._order.epochs_of(step)


def rank_slice(batch: Indices, *, rank: int, world_size: int, micro_batch_size: int) -> Indices:
    """The micro-batches [M, micro] of a rank, cut before they are distributed, so all world sizes have the same.

    Raises `UserError` if the batch cannot be cut evenly.
    """
    step_size = world_size * micro_batch_size
    if len(batch) % step_size:
        raise UserError(
            f"training.batch_size {len(batch)} cannot be cut into micro-batches of {micro_batch_size} on {world_size} "
            f"workers: set a multiple of {step_size}, or change training.micro_batch_size or launcher.workers"
        )
    return batch.reshape(-1, micro_batch_size)[rank::world_size]


def rank_micro_batches(
    order: SampleOrder, steps: Iterable[int], *, rank: int, world_size: int, micro_batch_size: int
) -> Iterator[tuple[Indices, Indices]]:
    """(samples, number of earlier draws), both [micro], of each micro-batch of a rank, step by step."""
    cut = partial(rank_slice, rank=rank, world_size=world_size, micro_batch_size=micro_batch_size)
    for step in steps:
        yield from zip(cut(order.batch(step)), cut(order.epochs_of(step)), strict=True)


def _positions(step: int, global_batch_size: int) -> Indices:
    return np.arange(step * global_batch_size, (step + 1) * global_batch_size, dtype=np.int64)


def _require_samples(num_samples: int) -> None:
    if not num_samples:
        raise UserError("data.train names a split without samples: choose another split, or pack the images again")
