"""Running statistics that do not depend on how a step is cut into micro-batches and ranks."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dpkd.engine.batch_norm import StepStatistics


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5, momentum=0.3)
    )


def buffers_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def step(module, statistics, micros, average=lambda vector: vector):
    for micro in micros:
        with statistics.micro_batch():
            module(micro)
    statistics.commit(average)


def test_one_micro_batch_moves_them_as_torch_does():
    ours, theirs = net(), net()
    statistics = StepStatistics(ours)
    for _ in range(3):
        image_BCHW = torch.randn(8, 3, 6, 6)
        theirs(image_BCHW)
        step(ours, statistics, [image_BCHW])
    for name, buffer in buffers_of(theirs).items():
        torch.testing.assert_close(buffers_of(ours)[name], buffer)


def test_two_ranks_end_as_one_rank_with_the_same_micro_batches():
    micros = [torch.randn(4, 3, 6, 6) for _ in range(4)]
    one = net()
    step(one, StepStatistics(one), micros)
    left, right = net(), net()
    sums = []

    def seen(vector):
        sums.append(vector)
        return vector

    for rank, share in ((left, micros[:2]), (right, micros[2:])):
        probe = copy.deepcopy(rank)
        step(probe, StepStatistics(probe), share, average=seen)
    mean = (sums[0] + sums[1]) / 2
    step(left, StepStatistics(left), micros[:2], average=lambda vector: mean)
    step(right, StepStatistics(right), micros[2:], average=lambda vector: mean)
    for name, buffer in buffers_of(one).items():
        torch.testing.assert_close(buffers_of(left)[name], buffer)
        assert torch.equal(buffers_of(left)[name], buffers_of(right)[name])


def test_a_step_is_the_formula_in_float64():
    module = nn.Sequential(nn.BatchNorm1d(2, momentum=0.2))
    micros = [torch.randn(5, 2) * 3 + 1 for _ in range(3)]
    step(module, StepStatistics(module), micros)
    arrays = [micro.double().numpy() for micro in micros]
    mean = 0.2 * np.mean([array.mean(0) for array in arrays], axis=0)
    variance = 0.8 + 0.2 * np.mean([array.var(0, ddof=1) for array in arrays], axis=0)
    np.testing.assert_allclose(module[0].running_mean.numpy(), mean, rtol=1e-5)
    np.testing.assert_allclose(module[0].running_var.numpy(), variance, rtol=1e-5)
    assert int(module[0].num_batches_tracked) == 1


def test_the_last_steps_statistics_stand_within_a_step():
    module = net()
    statistics, before = StepStatistics(module), buffers_of(module)
    with statistics.micro_batch():
        module(torch.randn(4, 3, 6, 6))
    after = buffers_of(module)
    assert all(torch.equal(after[name], before[name]) for name in before if "num_batches" not in name)


def test_backward_works_after_the_buffers_were_put_back():
    module = net()
    statistics = StepStatistics(module)
    with statistics.micro_batch():
        first = module(torch.randn(4, 3, 6, 6))
    with statistics.micro_batch():
        second = module(torch.randn(4, 3, 6, 6))
    (first.square().sum() + second.square().sum()).backward()
    assert module[0].weight.grad.abs().sum() > 0


def test_activation_checkpointing_changes_nothing():
    plain, recomputed = net(), net()
    image_BCHW = torch.randn(4, 3, 6, 6, requires_grad=True)
    for module, run in ((plain, plain), (recomputed, lambda x: checkpoint(recomputed, x, use_reentrant=False))):
        statistics = StepStatistics(module)
        with statistics.micro_batch():
            output = run(image_BCHW)
        output.square().sum().backward()
        statistics.commit(lambda vector: vector)
    for name, buffer in buffers_of(plain).items():
        assert torch.equal(buffers_of(recomputed)[name], buffer), name


def test_a_norm_without_momentum_keeps_the_mean_over_steps():
    module = nn.Sequential(nn.BatchNorm1d(2, momentum=None))
    statistics = StepStatistics(module)
    batches = [torch.randn(6, 2) for _ in range(4)]
    for batch in batches:
        step(module, statistics, [batch])
    torch.testing.assert_close(module[0].running_mean, torch.stack([batch.mean(0) for batch in batches]).mean(0))


def test_a_network_without_norms_needs_nothing_from_other_ranks():
    module, averaged = nn.Linear(3, 2), []
    step(module, StepStatistics(module), [torch.randn(2, 3)], average=averaged.append)
    assert not averaged


def test_a_commit_without_a_micro_batch_is_our_mistake():
    with pytest.raises(AssertionError, match="without a micro-batch"):
        StepStatistics(net()).commit(lambda vector: vector)


class Operations(TorchDispatchMode):
    """Counts the operations of torch."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_step_has_as_many_operations_for_many_norms_as_for_one():
    counts = []
    for num_norms in (1, 40):
        norms = (nn.BatchNorm1d(2, momentum=0.1 + place / 100) for place in range(num_norms))
        statistics = StepStatistics(nn.Sequential(*norms))
        with Operations() as operations:
            with statistics.micro_batch():
                pass
            statistics.commit(lambda vector: vector)
        counts.append(operations.count)
    assert counts[0] == counts[1] > 0


def test_a_step_moves_statistics_that_were_loaded_after_it_began_to_keep_them():
    ours, theirs = net(), net()
    statistics, saved = StepStatistics(ours), {name: tensor + 1 for name, tensor in net().state_dict().items()}
    image_BCHW = torch.randn(8, 3, 6, 6)
    for module in (ours, theirs):
        module.load_state_dict(saved)
    theirs(image_BCHW)
    step(ours, statistics, [image_BCHW])
    for name, buffer in buffers_of(theirs).items():
        torch.testing.assert_close(buffers_of(ours)[name], buffer)
