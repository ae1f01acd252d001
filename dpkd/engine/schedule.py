"""The learning rate of a step: linear warm-up, then a cosine (Loshchilov and Hutter 2017, eq. 5, without restarts)."""

import math

from dpkd.engine.settings import ScheduleSettings


def learning_rate(step: int, *, total_steps: int, base: float, settings: ScheduleSettings) -> float:
    """The rate of update `step` (0 is the first): up to `base` over the warm-up, `base * final` at the last step."""
    warmup_steps = round(settings.warmup * total_steps)
    if step < warmup_steps:
        return base * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return base * (settings.final + (1 - settings.final) * cosine)
