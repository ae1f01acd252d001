"""dpkd: distributed prior-knowledge distillation."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`dpkd.adapt`, loaded when it is asked for: it needs torch and timm."""
    if name != "adapt":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module("dpkd.verbs.adapt").adapt
