"""Loads initial weights from a file into a timm model."""

import inspect
import pickle
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from timm.models import load_state_dict
from torch import Tensor, nn

from dpkd.errors import UserError

OWN_PREFIX = "backbone.timm."
UNREADABLE = (SafetensorError, pickle.UnpicklingError, struct.error, zipfile.BadZipFile, OSError, EOFError,
              RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError)  # fmt: skip
"""The exceptions of torch and safetensors for bytes of another format."""


def load_weights(model: nn.Module, path: str) -> None:
    """Loads a local safetensors or PyTorch file into a timm model: a plain state dict, or a network saved by dpkd.

    No code in the file is run. timm's conversion for the model family runs first (it resamples position embeddings of
    another grid). The model keeps its classifier if the file has none or one of another size. Raises `UserError` if the
    file cannot be read or does not fit the model.
    """
    if not Path(path).is_file():
        raise UserError(f"weights {path} is not a file: give the path of a safetensors file or a PyTorch state dict")
    try:
        state = load_state_dict(path)
    except UNREADABLE as error:
        raise UserError(f"weights {path} cannot be read ({type(error).__name__}: {str(error)[:200]})") from error
    if not state or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"weights {path} has no state dict of tensors; save only the model's state_dict()")
    backbone = {name.removeprefix(OWN_PREFIX): tensor for name, tensor in state.items() if name.startswith(OWN_PREFIX)}
    state = _converted(model, backbone or state, path=path)
    configuration: Any = model.pretrained_cfg
    named = configuration.get("classifier") or ()
    classifier = tuple(f"{name}." for name in ((named,) if isinstance(named, str) else named))
    expected = model.state_dict()
    # older files lack the batch counts of batch norms
    may_miss = {
        name: expected[name] for name in expected if name.startswith(classifier) or name.endswith("num_batches_tracked")
    }
    fitting = {
        name: tensor
        for name, tensor in state.items()
        if not name.startswith(classifier) or (name in expected and tensor.shape == expected[name].shape)
    }
    try:
        model.load_state_dict({**may_miss, **fitting})
    except RuntimeError as error:
        raise UserError(
            f"weights {path} does not fit the model: {' '.join(str(error).split())[:500]}; give weights of the same "
            "model and arguments"
        ) from error


def _converted(model: nn.Module, state: dict[str, Tensor], *, path: str) -> dict[str, Tensor]:
    """The state dict after timm's conversion for the model family, if timm has one."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None or len(inspect.signature(convert).parameters) < 2:
        return dict(state)
    try:
        with torch.no_grad():
            return dict(convert(state, model))
    except (RuntimeError, KeyError, AssertionError, ValueError) as error:
        raise UserError(f"weights {path} does not fit the model ({type(error).__name__}: {error})") from error
