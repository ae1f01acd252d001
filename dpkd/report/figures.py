"""Figures as people read them. A figure that cannot be had is a dash, and never ends a run."""

from collections.abc import Callable
from typing import TypeVar

from dpkd.log import logger

DASH = "–"

Value = TypeVar("Value")


def figure_or_none(name: str, compute: Callable[[], Value]) -> Value | None:
    """What `compute` returns; None, and a line in the log, where it fails. It must not wait for other ranks."""
    try:
        return compute()
    except Exception as error:  # noqa: BLE001 (other libraries raise whatever they like at an unusual model)
        cause = (str(error).splitlines() or [""])[0][:200]
        logger.info(f"{name}: none, because of {type(error).__name__}: {cause}")
        return None


def percent(score: dict[str, float], *, sign: str = "") -> str:
    """`{"mean", "ci95"}` as `56.1 ± 0.4 %`; with `sign="+"`, as a signed difference."""
    return f"{100 * score['mean']:{sign}.1f} ± {100 * score['ci95']:.1f} %"


def rate_words(per_s: float | None) -> str:
    """Images a second: `1,234`."""
    return DASH if per_s is None else f"{per_s:,.0f}"


def count_words(count: int) -> str:
    """A number of parameters in words: `110 k`, `1.25 M`, `22 M`."""
    if count < 1_000_000:
        return f"{count / 1e3:.0f} k"
    return f"{count / 1e6:.2f} M" if count < 10_000_000 else f"{count / 1e6:.0f} M"
