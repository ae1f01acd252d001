"""Draws for samples: functions of seed, step and sample alone, and as even as they should be."""

import torch

from dpkd.objectives.draws import random_share

INDEX_B = torch.arange(20_000)


def test_the_share_is_kept_and_zero_and_one_are_none_and_all():
    for share in (0.1, 0.5, 0.9):
        chosen_B = random_share(INDEX_B, step=3, share=share, seed=1)
        assert abs(chosen_B.double().mean().item() - share) < 0.015  # four standard deviations
    assert not random_share(INDEX_B, step=3, share=0.0, seed=1).any()
    assert random_share(INDEX_B, step=3, share=1.0, seed=1).all()


def test_a_sample_is_chosen_alike_wherever_it_stands_in_a_batch():
    whole_B = random_share(INDEX_B, step=7, share=0.3, seed=2)
    order_B = torch.randperm(len(INDEX_B), generator=torch.Generator().manual_seed(0))
    assert torch.equal(random_share(order_B, step=7, share=0.3, seed=2), whole_B[order_B])


def test_steps_and_seeds_draw_independently():
    one = random_share(INDEX_B, step=1, share=0.5, seed=1)
    for step, seed in ((2, 1), (1, 2)):
        other = random_share(INDEX_B, step=step, share=0.5, seed=seed)
        assert abs((one == other).double().mean().item() - 0.5) < 0.015
