"""Whatever attempts a run is made of, each sample is used as the order says; and an audit is never deceived.

An attempt has a world size of its own, goes on from the newest checkpoint, and is killed anywhere: in a step, with the
logs of some ranks flushed, of all, or with the checkpoint published. Order, dealing, logs, history and judgement are
the real ones; no process is needed for them.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dpkd.data.batch import Batch, View
from dpkd.data.order import ClassAwareOrder, Order, OrderWithout, SampleOrder, rank_micro_batches, rank_slice
from dpkd.engine.world import World
from dpkd.errors import UserError
from dpkd.train.sample_log import SampleLog, checksum, read_history
from dpkd.verbs.audit import judge

FEW = settings(max_examples=max(30, settings.default.max_examples // 3))
EMPTY = torch.empty(0)


@dataclass(frozen=True)
class Attempt:
    """One attempt at a run: how it deals the batches, and where it ends."""

    world_size: int
    micro_batch_size: int
    num_steps: int
    """Steps that it makes before it is killed."""
    flushes: int
    """Ranks that still flush their logs after the last of them."""
    publishes: bool
    """Whether a checkpoint then stands, given that all have flushed."""
    torn: float
    """Share of what was flushed for no checkpoint that a torn write leaves."""


@st.composite
def attempts(draw, batch_size: int) -> Attempt:
    micro = draw(st.sampled_from([size for size in range(1, batch_size + 1) if batch_size % size == 0]))
    sizes = [size for size in range(1, batch_size // micro + 1) if batch_size // micro % size == 0]
    size = draw(st.sampled_from(sizes))
    flushes = draw(st.integers(0, size))
    torn = draw(st.sampled_from([0.0, 0.3, 0.99, 1.0]))
    return Attempt(size, micro, draw(st.integers(0, 7)), flushes, draw(st.booleans()), torn)


@st.composite
def orders(draw) -> SampleOrder:
    batch_size = draw(st.sampled_from([1, 2, 6, 12]))
    seed = draw(st.integers(0, 9))
    label_N = np.array(draw(st.lists(st.integers(-1, 2), min_size=4, max_size=30)))
    left_out = np.array(sorted(draw(st.sets(st.integers(0, len(label_N) - 1), max_size=3))), np.int64)
    num_left = len(label_N) - len(left_out)
    order: SampleOrder
    if draw(st.booleans()) and (np.delete(label_N, left_out) >= 0).any():
        order = ClassAwareOrder(np.delete(label_N, left_out), seed=seed, global_batch_size=batch_size)
    else:
        shards = [num_left // 2, num_left - num_left // 2]
        order = Order(shards, seed=seed, global_batch_size=batch_size, block_shards=draw(st.integers(1, 2)))
    return OrderWithout(order, left_out) if len(left_out) else order


def batches(order: SampleOrder, steps: range, *, rank: int, attempt: Attempt):
    """The micro-batches of a rank, without images."""
    own = rank_micro_batches(
        order, steps, rank=rank, world_size=attempt.world_size, micro_batch_size=attempt.micro_batch_size
    )
    for index_B, epoch_B in own:
        yield Batch(
            {"global": View(EMPTY)},
            {"class": EMPTY},
            torch.from_numpy(index_B.copy()),
            torch.from_numpy(epoch_B.copy()),
        )


def perform(folder: Path, order: SampleOrder, attempt: Attempt, *, number: int, start: int, stop: int) -> int:
    """One attempt from the checkpoint after step `start`; returns the step of the one that then stands."""
    end = min(start + attempt.num_steps, stop)
    per_rank = order.global_batch_size // attempt.micro_batch_size // attempt.world_size
    for rank in range(attempt.world_size):
        world = World(rank=rank, size=attempt.world_size, local_rank=rank, device=torch.device("cpu"))
        log = SampleLog(
            folder, attempt=number, world=world, micro_batch_size=attempt.micro_batch_size, start_step=start
        )
        drawn = batches(order, range(start, stop), rank=rank, attempt=attempt)
        seen = log.record(drawn, steps=range(start, stop), micro_batches=per_rank)
        for _ in range(per_rank * (end - start)):
            next(seen)
        if rank < attempt.flushes:
            log.snapshot()(folder)
    if attempt.flushes == attempt.world_size and attempt.publishes:
        return end
    for path in folder.glob(f"attempt-{number:04d}-*"):  # no checkpoint covers it: any of it may be lost
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * attempt.torn)])
    return start


def perform_all(folder: Path, order: SampleOrder, given_attempts: list[Attempt], *, stop: int) -> None:
    """The attempts, and one more that comes to the end."""
    first = given_attempts[0]
    last = Attempt(first.world_size, first.micro_batch_size, stop, first.world_size, True, 1.0)
    done = 0
    for number, attempt in enumerate([*given_attempts, last], start=1):
        done = perform(folder, order, attempt, number=number, start=done, stop=stop)
    assert done == stop


@settings(max_examples=settings.default.max_examples)
@given(data=st.data(), order=orders(), stop=st.integers(1, 15))
def test_any_attempts_use_each_sample_as_the_order_says(data, order, stop, tmp_path_factory):
    folder = tmp_path_factory.mktemp("log")
    perform_all(
        folder, order, data.draw(st.lists(attempts(order.global_batch_size), min_size=1, max_size=5)), stop=stop
    )
    assert judge(read_history(folder), order, range(stop)) == {}


def told(folder: Path, order: SampleOrder, stop: int) -> bool:
    """Whether an audit of these logs would call the run proved."""
    try:
        return not judge(read_history(folder), order, range(stop))
    except UserError as error:
        assert str(error).strip(), "refused without a reason"  # noqa: PT017 (either outcome is right)
        return False


FAULTS = ("another sample", "a step twice", "a step skipped", "begins too late", "begins too early", "steps swapped")


@FEW
@given(data=st.data(), fault=st.sampled_from(FAULTS), seed=st.integers(0, 5))
def test_an_audit_sees_what_was_skipped_or_used_twice(data, fault, seed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("log")
    order = Order([9, 8], seed=seed, global_batch_size=6, block_shards=1)
    attempt = data.draw(attempts(6).filter(lambda each: each.num_steps >= 3))
    whole = Attempt(attempt.world_size, attempt.micro_batch_size, attempt.num_steps, attempt.world_size, True, 1.0)
    done = perform(folder, order, whole, number=1, start=0, stop=20)
    assert told(folder, order, done)
    victim = data.draw(st.integers(0, attempt.world_size - 1))
    path = folder / f"attempt-0001-rank-{victim:05d}.log"
    head, *lines = path.read_text().splitlines(keepends=True)
    place = data.draw(st.integers(0, len(lines) - 2))
    if fault == "another sample":
        layout = {"world_size": attempt.world_size, "micro_batch_size": attempt.micro_batch_size}
        samples = rank_slice(order.batch(place), rank=victim, **layout).copy()
        samples[0, 0] = (samples[0, 0] + data.draw(st.integers(1, 16))) % 17
        lines[place] = f"{place} {checksum(samples)}\n"
    elif fault == "a step twice":
        lines.insert(data.draw(st.integers(place, len(lines))), lines[place])
    elif fault == "a step skipped":
        del lines[place]
    elif fault == "steps swapped":
        (one, of_one), (other, of_other) = lines[place].split(), lines[place + 1].split()
        assume(of_one != of_other)
        lines[place : place + 2] = [f"{one} {of_other}\n", f"{other} {of_one}\n"]
    path.write_text(head + "".join(lines))
    if fault == "begins too late":
        perform(folder, order, whole, number=2, start=done + 1, stop=20)
        done += 1 + whole.num_steps
    elif fault == "begins too early":  # a step of an attempt that began at a later one
        late = folder / "attempt-0002-rank-00000.log"
        perform(folder, order, Attempt(1, 1, 2, 1, True, 1.0), number=2, start=done, stop=20)
        head, *lines = late.read_text().splitlines(keepends=True)
        late.write_text("".join([head, f"{done - 1} {checksum(order.batch(done - 1))}\n", *lines]))
        done += 2
    assert not told(folder, order, done)


@FEW
@given(data=st.data(), seed=st.integers(0, 5))
def test_an_older_attempt_that_goes_on_after_a_newer_has_begun_changes_nothing(data, seed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("log")
    order = Order([9, 8], seed=seed, global_batch_size=6, block_shards=1)
    first, second = data.draw(attempts(6)), data.draw(attempts(6))
    overlap = Attempt(first.world_size, first.micro_batch_size, 9, first.world_size, True, 1.0)
    perform(folder, order, overlap, number=1, start=0, stop=9)  # fenced: what it did from step 4 on counts for nothing
    stop = 4 + second.num_steps
    whole = Attempt(second.world_size, second.micro_batch_size, second.num_steps, second.world_size, True, 1.0)
    perform(folder, order, whole, number=2, start=4, stop=stop)
    assert told(folder, order, stop)
    assert set(read_history(folder).steps) == set(range(stop if second.num_steps else 4))
