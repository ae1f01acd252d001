"""Loads initial weights from a file into a timm model."""

import inspect
import pickle
import re
import struct
import sys
import warnings
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from timm.models import load_state_dict
from torch import Tensor, nn

from dpkd.errors import UserError

UNREADABLE = (SafetensorError, pickle.UnpicklingError, struct.error, zipfile.BadZipFile, OSError, EOFError,
              RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError)  # fmt: skip
"""The exceptions of torch and safetensors for bytes of another format."""


def load_weights(model: nn.Module, path: str) -> None:
    """Loads a local safetensors or PyTorch file into a timm model: a state dict, or a checkpoint that holds one.

    No code in the file is run. A prefix of all names (of Lightning, DistributedDataParallel, torch.compile or dpkd) is
    removed. Then timm's conversion for the model family runs (it resamples position embeddings of another grid). The
    model keeps its classifier if the file has none or one of another size. Raises `UserError` if the file
    cannot be read or does not fit the model.
    """
    if not Path(path).is_file():
        raise UserError(f"weights {path} is not a file: give the path of a safetensors file or a PyTorch state dict")
    try:
        state = load_state_dict(path)
    except UNREADABLE as error:
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(
            f"weights {path} cannot be read ({cause}): save only the model's state_dict(), by safetensors or torch.save"
        ) from error
    if not state or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"weights {path} has no state dict of tensors: save only the model's state_dict()")
    expected = model.state_dict()
    state = _converted(model, _without_prefix(state, expected, path=path), path=path)
    configuration: Any = model.pretrained_cfg
    named = configuration.get("classifier") or ()
    classifier = tuple(f"{name}." for name in ((named,) if isinstance(named, str) else named))
    # older files lack the batch counts of batch norms
    may_miss = {
        name: expected[name] for name in expected if name.startswith(classifier) or name.endswith("num_batches_tracked")
    }
    fitting = {
        name: tensor
        for name, tensor in state.items()
        if not name.startswith(classifier) or (name in expected and tensor.shape == expected[name].shape)
    }
    loaded = {**may_miss, **fitting}
    faults = _differences(loaded, expected)
    if faults:
        both = f"{faults[0]}, {faults[-1]}" if len(faults) > 1 else faults[0]
        raise UserError(
            f"weights {path} does not fit the model, in {len(faults)} names: {both}; give weights of the same model "
            "and arguments"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*meta parameter.*")  # a network without memory is only checked
        model.load_state_dict(loaded)


def _without_prefix(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, path: str) -> dict[str, Tensor]:
    """The tensors under the prefix that leaves most names of the model, without the prefix; all if none does.

    Raises `UserError` if several prefixes leave as many, because the file holds several networks.
    """
    places = ((name, start) for name in state for start in (0, *(dot.end() for dot in re.finditer(r"\.", name))))
    num_fitting = Counter(name[:start] for name, start in places if name[start:] in expected)
    best = [prefix for prefix, count in num_fitting.items() if count == max(num_fitting.values())]
    if len(best) > 1:
        raise UserError(f"weights {path} holds several networks ({', '.join(best[:5])}): save the state_dict() of one")
    prefix = best[0] if best else ""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _differences(loaded: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """The names that only the file or only the model has, and those of tensors of another shape, as sentences."""
    faults = [f"the model has {name!r}, which the file lacks" for name in expected if name not in loaded]
    faults += [f"the file has {name!r}, which the model lacks" for name in loaded if name not in expected]
    shapes = {name: (tuple(loaded[name].shape), tuple(expected[name].shape)) for name in loaded if name in expected}
    return faults + [
        f"{name!r} is {ours} in the file and {its} in the model" for name, (ours, its) in shapes.items() if ours != its
    ]


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
