"""A step that spoils a network is undone and passed over, a few times at most."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

from dpkd.data.batch import Batch, View
from dpkd.engine.protocol import Engine
from dpkd.engine.settings import EngineSettings, OptimizerSettings, TrainingSettings
from dpkd.engine.torch_engine import TorchEngine
from dpkd.engine.world import World
from dpkd.errors import UserError
from dpkd.models.parameters import parameter_groups
from dpkd.train.checkpoint import Checkpoints
from dpkd.train.divergence import Diverged, Norm, NormGuard, read_skipped, train_past_divergence, write_skipped
from dpkd.train.loop import Plan, train
from dpkd.train.meter import Meter

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
TOTAL, SAVED_EVERY = 12, 2


class Regression:
    """One linear layer that follows its batch; at the steps `poisoned` the loss is no number."""

    def __init__(self, *, poisoned: tuple[int, ...]) -> None:
        torch.manual_seed(0)
        module = nn.Linear(3, 1)
        self.engine: Engine = TorchEngine(
            module,
            parameter_groups=parameter_groups(module, weight_decay=0.0, layer_decay=1.0),
            optimizer=OptimizerSettings(),
            settings=EngineSettings(),
            world=ALONE,
            accumulation=1,
            micro_batch_size=4,
            precision="fp32",
        )
        self._poisoned = poisoned
        self.seen: list[int] = []

    @property
    def engines(self) -> Mapping[str, Engine]:
        return {"net": self.engine}

    def losses(self, batch: Batch, *, step: int) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        self.seen.append(step)
        loss = self.engine.forward(batch.views["global"].image_BCHW).square().mean()
        yield "net", {"square": loss * math.nan if step in self._poisoned else loss}

    def learning_rate(self, name: str, *, step: int) -> float:
        return 0.01 * (step + 1)


def batches(steps: list[int]) -> Iterator[Batch]:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        empty = torch.zeros(4)
        yield Batch({"global": View(torch.randn(4, 3, generator=generator))}, {"class": empty}, empty, empty)


def run(folder: Path, *, poisoned: tuple[int, ...], limit: int = 3, skipped: tuple[int, ...] = ()) -> Regression:
    """Trains to the end, past what is poisoned; `skipped` steps are passed over from the start."""
    task = Regression(poisoned=poisoned)
    path = folder / "skipped.json"
    if skipped:
        write_skipped(path, dict.fromkeys(skipped, "of old"))
    checkpoints, parts = Checkpoints(folder / "checkpoints", world=ALONE, keep=2), {"net": task.engine.state}

    def attempt(start_step: int, passed: frozenset[int]) -> None:
        plan = Plan(TOTAL, 1, 1, SAVED_EVERY, None, None, skipped=passed)
        train(
            task,
            batches(plan.steps_from(start_step)),
            plan=plan,
            start_step=start_step,
            checkpoints=checkpoints,
            parts=parts,
            meter=Meter(world=ALONE, images_per_step=4),
            guard=NormGuard(spike=None),
            evaluate=lambda _: None,
            draw_panels=lambda *_: None,
            world=ALONE,
        )

    train_past_divergence(attempt, checkpoints=checkpoints, parts=parts, skipped=path, limit=limit, world=ALONE)
    return task


@pytest.mark.parametrize("poisoned", [(5,), (4, 9), (11,)])
def test_a_run_ends_as_if_the_poisoned_steps_had_never_been(tmp_path: Path, poisoned: tuple[int, ...]) -> None:
    task = run(tmp_path / "poisoned", poisoned=poisoned)
    clean = run(tmp_path / "clean", poisoned=(), skipped=poisoned)
    assert all(
        torch.equal(task.engine.state.weights()[name], weight) for name, weight in clean.engine.state.weights().items()
    )
    assert read_skipped(tmp_path / "poisoned" / "skipped.json").keys() == set(poisoned)
    assert not set(clean.seen) & set(poisoned)


def test_it_goes_back_to_the_newest_checkpoint_only(tmp_path: Path) -> None:
    assert run(tmp_path, poisoned=(5,)).seen == [0, 1, 2, 3, 4, 5, 4, 6, 7, 8, 9, 10, 11]


def test_too_many_stop_the_run_and_name_the_step_and_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step 9: net: the gradient is nan .*2 earlier steps.*max_skipped_steps \(2\)"):
        run(tmp_path, poisoned=(4, 6, 8), limit=2)


def test_without_a_checkpoint_there_is_no_way_back(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step 1: .*there is no checkpoint to go back to"):
        run(tmp_path, poisoned=(0,))


def test_a_later_attempt_passes_over_the_same_steps(tmp_path: Path) -> None:
    run(tmp_path, poisoned=(5,))
    (tmp_path / "checkpoints").rename(tmp_path / "aside")
    assert 5 not in run(tmp_path, poisoned=()).seen


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"steps": {"x": 1}}', b'{"steps": 7}'])
def test_a_damaged_list_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "skipped.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"skipped\.json cannot be read"):
        run(tmp_path, poisoned=())


def test_a_spike_is_one_against_the_median_of_the_norms_before() -> None:
    guard = NormGuard(spike=10.0)
    for step in range(20):
        guard.check([Norm("net", step, 0.1, 1.0 + step % 3)])
    guard.check([Norm("net", 20, 0.1, 19.9)])
    with pytest.raises(Diverged, match=r"norm is 20\.1, and the median of the last is 2 "):
        guard.check([Norm("net", 21, 0.1, 20.1)])
    guard.check([Norm("other", 21, 0.1, 500.0)])  # each network has its own


def test_the_first_norms_are_no_spikes_and_without_a_limit_none_is() -> None:
    early, free, full = NormGuard(spike=2.0), NormGuard(spike=None), NormGuard(spike=2.0)
    for step, norm in enumerate([1.0, 50.0, 3.0]):
        early.check([Norm("net", step, 0.1, norm)])
    for step in range(30):
        free.check([Norm("net", step, 0.1, 1.0)])
        full.check([Norm("net", step, 0.1, 1.0)])
    free.check([Norm("net", 30, 0.1, 1e6)])
    with pytest.raises(Diverged, match="median of the last is 1 "):
        full.check([Norm("net", 30, 0.1, 1e6)])


def test_a_hard_image_is_no_spike_for_a_network_that_knows_all_others_by_heart() -> None:
    guard = NormGuard(spike=TrainingSettings(steps=1).spike)
    for step, norm in enumerate([1e-6] * 30 + [900.0]):
        guard.check([Norm("net", step, 0.1, norm)])
    with pytest.raises(Diverged, match="norm is 2e"):
        guard.check([Norm("net", 31, 0.1, 2000.0)])


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_what_is_no_number_always_counts(norm: float) -> None:
    with pytest.raises(Diverged):
        NormGuard(spike=None).check([Norm("net", 0, 0.1, norm)])
