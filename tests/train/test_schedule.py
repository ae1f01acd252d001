"""The learning rate over a stage."""

import pytest
import torch

from dpkd.engine.optimizer import learning_rate
from dpkd.engine.settings import ScheduleSettings


def rates(total_steps: int, settings: ScheduleSettings) -> list[float]:
    return [learning_rate(step, total_steps=total_steps, base=2.0, settings=settings) for step in range(total_steps)]


def test_the_warm_up_rises_in_equal_parts_to_the_base_rate() -> None:
    assert rates(20, ScheduleSettings(warmup=0.25))[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])


def test_after_the_warm_up_the_rate_is_torchs_cosine() -> None:
    settings = ScheduleSettings(warmup=0.2, final=0.1)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=39, eta_min=0.2)
    expected = []
    for _ in range(40):
        expected.append(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()
    assert rates(50, settings)[10:] == pytest.approx(expected)


def test_the_last_step_has_the_final_share_of_the_rate() -> None:
    assert rates(50, ScheduleSettings(final=0.01))[-1] == pytest.approx(0.02)


def test_steps_past_the_end_keep_the_final_rate() -> None:
    assert learning_rate(80, total_steps=50, base=2.0, settings=ScheduleSettings(final=0.5)) == pytest.approx(1.0)


@pytest.mark.parametrize("warmup", [0.0, 0.3, 0.99])
@pytest.mark.parametrize("total_steps", [1, 2, 3])
def test_the_shortest_stages_have_rates_above_zero(total_steps: int, warmup: float) -> None:
    assert all(0 < rate <= 2.0 for rate in rates(total_steps, ScheduleSettings(warmup=warmup)))
