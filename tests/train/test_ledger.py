"""What the ledger says was used is what was used, whatever was cut off or rolled back."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dpkd.data.order import Order, rank_slice
from dpkd.data.stream import Batch
from dpkd.engine.world import World
from dpkd.train.sample_log import History, Ledger, forget, history, read_ledgers

BATCH, MICRO = 8, 2
ORDER = Order([13, 9], seed=3, global_batch_size=BATCH, block_shards=1)


def batch_of(samples: np.ndarray) -> Batch:
    empty = torch.empty(len(samples), 0)
    return Batch(image_BCHW=empty, label_B=empty, index_B=torch.from_numpy(samples), epoch_B=empty)


def use(folder: Path, *, attempt: int, steps: range, world_size: int = 1, wrong: int | None = None) -> None:
    """Writes what the ranks of an attempt use; at step `wrong` a sample is used twice."""
    for rank in range(world_size):
        world = World(rank=rank, size=world_size, local_rank=rank, device=torch.device("cpu"))
        ledger = Ledger(folder, attempt=attempt, world=world, micro_batch_size=MICRO, start_step=steps.start)
        batches = []
        for step in steps:
            samples = ORDER.batch(step).copy()
            if step == wrong:
                samples[0] = samples[1]
            dealt = rank_slice(samples, rank=rank, world_size=world_size, micro_batch_size=MICRO)
            batches += [batch_of(micro) for micro in dealt]
        micro_batches = BATCH // MICRO // world_size
        seen = ledger.recorded(batches, steps=steps, micro_batches=micro_batches)
        for _ in batches:  # as training, which asks for no batch after the last
            next(seen)
        ledger.snapshot()(folder)


def read(folder: Path) -> History:
    return history(read_ledgers(folder))


def as_ordered(found: History) -> list[int]:
    """Steps of the history that used just what the order says."""
    return [
        step
        for step, each in found.steps.items()
        if each.samples is not None and np.array_equal(each.samples, ORDER.batch(step))
    ]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_steps_samples_come_back_in_the_order_of_the_global_batch(tmp_path: Path, world_size: int) -> None:
    use(tmp_path, attempt=1, steps=range(7), world_size=world_size)
    found = read(tmp_path)
    assert as_ordered(found) == list(range(7))
    assert found.num_rolled_back == 0


def test_a_step_counts_as_the_last_attempt_made_it(tmp_path: Path) -> None:
    use(tmp_path, attempt=1, steps=range(6), wrong=4)
    use(tmp_path, attempt=2, steps=range(4, 9), world_size=2)
    found = read(tmp_path)
    assert as_ordered(found) == list(range(9))
    assert found.num_rolled_back == 2
    assert [each.attempt for each in found.steps.values()] == [1] * 4 + [2] * 5


def test_a_sample_used_twice_is_seen(tmp_path: Path) -> None:
    use(tmp_path, attempt=1, steps=range(6), wrong=4)
    assert as_ordered(read(tmp_path)) == [0, 1, 2, 3, 5]


def test_a_step_that_a_rank_did_not_finish_has_no_samples(tmp_path: Path) -> None:
    use(tmp_path, attempt=1, steps=range(3), world_size=2)
    path = tmp_path / "attempt-0001-rank-00001.ledger"
    path.write_bytes(path.read_bytes()[:-3])
    found = read(tmp_path)
    assert as_ordered(found) == [0, 1]
    assert found.steps[2].samples is None


@pytest.mark.parametrize("cut", range(0, 60, 7))
def test_a_record_cut_short_is_left_out_and_those_before_it_stay(tmp_path: Path, cut: int) -> None:
    use(tmp_path, attempt=1, steps=range(5))
    path = tmp_path / "attempt-0001-rank-00000.ledger"
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) - cut])
    assert as_ordered(read(tmp_path)) == list(range(5 - -(-cut // 44)))


def test_a_ledger_cut_short_in_its_first_line_says_nothing(tmp_path: Path) -> None:
    use(tmp_path, attempt=1, steps=range(5))
    (tmp_path / "attempt-0002-rank-00000.ledger").write_bytes(b'{"attempt": 2, "ra')
    assert as_ordered(read(tmp_path)) == list(range(5))


@pytest.mark.parametrize("content", [b"no ledger\n", b'{"attempt": "x"}\n', b"[1]\n"])
def test_a_file_that_is_no_ledger_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "attempt-0001-rank-00000.ledger"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=path.name):
        read_ledgers(tmp_path)


def ledger_of(folder: Path, *, attempt: int = 1) -> Path:
    return folder / f"attempt-{attempt:04d}-rank-00000.ledger"


def test_a_step_that_stands_twice_in_a_ledger_is_named(tmp_path: Path) -> None:
    use(tmp_path, attempt=1, steps=range(5))
    with ledger_of(tmp_path).open("ab") as file:
        file.write(ledger_of(tmp_path).read_bytes().partition(b"\n")[2][:44])
    with pytest.raises(ValueError, match=r"attempt-0001-rank-00000\.ledger has step 1 a second time"):
        read(tmp_path)


def test_a_step_before_the_attempt_began_is_named(tmp_path: Path) -> None:
    use(tmp_path, attempt=2, steps=range(3, 5))
    path = ledger_of(tmp_path, attempt=2)
    path.write_bytes(path.read_bytes().replace(b'"start_step": 3', b'"start_step": 4'))
    with pytest.raises(ValueError, match=r"has step 4 .* before the attempt began"):
        read(tmp_path)


def test_a_ledger_under_another_name_is_named(tmp_path: Path) -> None:
    use(tmp_path, attempt=1, steps=range(5))
    ledger_of(tmp_path).rename(ledger_of(tmp_path, attempt=2))
    with pytest.raises(ValueError, match=r"attempt-0002.* is the ledger of attempt 1, rank 0"):
        read(tmp_path)


def test_ranks_that_do_not_agree_on_their_attempt_are_refused(tmp_path: Path) -> None:
    use(tmp_path / "two", attempt=1, steps=range(3), world_size=2)
    use(tmp_path / "later", attempt=1, steps=range(1, 3), world_size=2)
    other = (tmp_path / "later" / "attempt-0001-rank-00001.ledger").read_bytes()
    (tmp_path / "two" / "attempt-0001-rank-00001.ledger").write_bytes(other)
    with pytest.raises(ValueError, match="ranks of attempt 1 are not of one attempt"):
        read(tmp_path / "two")


def test_a_stage_that_begins_anew_forgets_what_has_no_checkpoint_any_more(tmp_path: Path) -> None:
    use(tmp_path, attempt=1, steps=range(5))
    use(tmp_path, attempt=2, steps=range(4, 6), wrong=5)
    forget(tmp_path, from_attempt=2)
    use(tmp_path, attempt=2, steps=range(4, 6))
    assert as_ordered(read(tmp_path)) == list(range(6))
