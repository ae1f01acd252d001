"""dpkd: distributed prior-knowledge distillation."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`dpkd.adapt`, `predict`, `embed` and `neighbours`, loaded when asked for: they need torch and timm."""
    if name not in ("adapt", "predict", "embed", "neighbours"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"dpkd.verbs.{'adapt' if name == 'adapt' else 'predict'}"), name)
