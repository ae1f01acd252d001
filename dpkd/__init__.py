"""dpkd: distributed prior-knowledge distillation."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"


VERBS = ("adapt", "fit")


def __getattr__(name: str) -> Any:
    """`dpkd.adapt` and `dpkd.fit`, loaded when they are asked for: they need many packages."""
    if name not in VERBS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"dpkd.verbs.{name}"), name)
