"""What the sample log holds is what was used, whatever was cut off or rolled back."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dpkd.data.batch import Batch, View
from dpkd.data.order import Order, rank_slice
from dpkd.engine.world import World
from dpkd.errors import UserError
from dpkd.train.sample_log import SampleLog, read_history, truncate
from dpkd.verbs.audit import judge

BATCH, MICRO = 8, 2
ORDER = Order([13, 9], seed=3, global_batch_size=BATCH, block_shards=1)


def batch_of(samples: np.ndarray) -> Batch:
    empty = torch.empty(len(samples), 0)
    return Batch(
        views={"global": View(empty)}, targets={"class": empty}, index_B=torch.from_numpy(samples), epoch_B=empty
    )


def use(folder: Path, *, attempt: int, steps: range, world_size: int = 1, wrong: int | None = None) -> None:
    """Writes what the ranks of an attempt use; at step `wrong` a sample is used twice."""
    for rank in range(world_size):
        world = World(rank=rank, size=world_size, local_rank=rank, device=torch.device("cpu"))
        log = SampleLog(folder, attempt=attempt, world=world, micro_batch_size=MICRO, start_step=steps.start)
        batches = []
        for step in steps:
            samples = ORDER.batch(step).copy()
            if step == wrong:
                samples[0] = samples[1]
            dealt = rank_slice(samples, rank=rank, world_size=world_size, micro_batch_size=MICRO)
            batches += [batch_of(micro) for micro in dealt]
        recorded = log.record(batches, steps=steps, micro_batches=BATCH // MICRO // world_size)
        for _ in batches:  # as training, which asks for no batch after the last
            next(recorded)
        log.snapshot()(folder)


def log_of(folder: Path, *, attempt: int = 1, rank: int = 0) -> Path:
    return folder / f"attempt-{attempt:04d}-rank-{rank:05d}.log"


def as_ordered(folder: Path) -> list[int]:
    """Steps of the history that used just what the order says."""
    history = read_history(folder)
    return [step for step in history.steps if not judge(history, ORDER, [step])]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_log_of_every_rank_is_that_of_the_order(tmp_path: Path, world_size: int) -> None:
    use(tmp_path, attempt=1, steps=range(7), world_size=world_size)
    assert as_ordered(tmp_path) == list(range(7))
    assert read_history(tmp_path).num_rolled_back == 0


def test_a_step_counts_as_the_last_attempt_made_it(tmp_path: Path) -> None:
    use(tmp_path, attempt=1, steps=range(6), wrong=4)
    use(tmp_path, attempt=2, steps=range(4, 9), world_size=2)
    history = read_history(tmp_path)
    assert as_ordered(tmp_path) == list(range(9))
    assert history.num_rolled_back == 2
    assert [step.attempt for step in history.steps.values()] == [1] * 4 + [2] * 5


def test_a_sample_used_twice_is_seen_with_its_rank(tmp_path: Path) -> None:
    use(tmp_path, attempt=1, steps=range(6), wrong=4, world_size=2)
    assert as_ordered(tmp_path) == [0, 1, 2, 3, 5]
    assert judge(read_history(tmp_path), ORDER, range(6)) == {4: "attempt 1 used other samples on rank 0"}


def test_a_step_that_a_rank_did_not_finish_is_seen(tmp_path: Path) -> None:
    use(tmp_path, attempt=1, steps=range(3), world_size=2)
    path = log_of(tmp_path, rank=1)
    path.write_bytes(path.read_bytes()[:-3])
    assert judge(read_history(tmp_path), ORDER, range(4)) == {
        2: "attempt 1 has it for some of its ranks only",
        3: "no attempt has it in its log",
    }


@pytest.mark.parametrize("cut", range(0, 30, 4))
def test_a_line_cut_short_is_left_out_and_those_before_it_stay(tmp_path: Path, cut: int) -> None:
    use(tmp_path, attempt=1, steps=range(5))
    path = log_of(tmp_path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size - cut])
    assert as_ordered(tmp_path) == list(range(5 - -(-cut // 11)))


def test_a_log_cut_short_in_its_first_line_says_nothing(tmp_path: Path) -> None:
    use(tmp_path, attempt=1, steps=range(5))
    log_of(tmp_path, attempt=2).write_bytes(b'{"attempt": 2, "ra')
    assert as_ordered(tmp_path) == list(range(5))


@pytest.mark.parametrize("content", [b"no log\n", b'{"attempt": "x"}\n', b"[1]\n", b"\xff\n"])
def test_a_file_that_is_no_log_is_named(tmp_path: Path, content: bytes) -> None:
    log_of(tmp_path).write_bytes(content)
    with pytest.raises(UserError, match=log_of(tmp_path).name):
        read_history(tmp_path)


def test_a_step_that_stands_twice_in_a_log_is_named(tmp_path: Path) -> None:
    use(tmp_path, attempt=1, steps=range(5))
    with log_of(tmp_path).open("ab") as file:
        file.write(log_of(tmp_path).read_bytes().splitlines(keepends=True)[1])
    with pytest.raises(UserError, match=r"attempt-0001-rank-00000\.log .*twice"):
        read_history(tmp_path)


def test_a_step_before_the_attempt_began_is_named(tmp_path: Path) -> None:
    use(tmp_path, attempt=2, steps=range(3, 5))
    path = log_of(tmp_path, attempt=2)
    path.write_bytes(path.read_bytes().replace(b'"start_step": 3', b'"start_step": 4'))
    with pytest.raises(UserError, match="before the attempt started"):
        read_history(tmp_path)


def test_ranks_that_do_not_agree_on_their_attempt_are_refused(tmp_path: Path) -> None:
    use(tmp_path / "two", attempt=1, steps=range(3), world_size=2)
    use(tmp_path / "later", attempt=1, steps=range(1, 3), world_size=2)
    log_of(tmp_path / "two", rank=1).write_bytes(log_of(tmp_path / "later", rank=1).read_bytes())
    with pytest.raises(UserError, match="it contradicts the logs of other ranks of attempt 1"):
        read_history(tmp_path / "two")


def test_a_stage_that_begins_anew_removes_the_logs_without_checkpoints(tmp_path: Path) -> None:
    use(tmp_path, attempt=1, steps=range(5))
    use(tmp_path, attempt=2, steps=range(4, 6), wrong=5)
    truncate(tmp_path, from_attempt=2)
    use(tmp_path, attempt=2, steps=range(4, 6))
    assert as_ordered(tmp_path) == list(range(6))
