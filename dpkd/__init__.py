"""dpkd: distributed prior-knowledge distillation."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"


FUNCTIONS = {"adapt": "adapt", "fit": "fit", "predict": "predict", "embed": "predict", "neighbours": "predict"}
"""The module of each function."""


def __getattr__(name: str) -> Any:
    """The functions of the commands, loaded when they are asked for: they need torch and more."""
    if name not in FUNCTIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"dpkd.verbs.{FUNCTIONS[name]}"), name)
