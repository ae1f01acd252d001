"""Weights to start from, read from a file into a timm model."""

import inspect
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dpkd.errors import UserError

OWN_PREFIX = "backbone.timm."
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Keys under which training codes put a model's state dict."""


UNREADABLE = (
    SafetensorError,
    pickle.UnpicklingError,
    struct.error,
    OSError,
    EOFError,
    RuntimeError,
    zipfile.BadZipFile,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    OverflowError,
    MemoryError,
)
"""What torch and safetensors raise over bytes that are not theirs."""


def load_weights(model: nn.Module, path: str) -> None:
    """Loads a local safetensors or PyTorch file into a timm model: a plain state dict, or a network saved by dpkd.

    timm's own conversion for the model family runs first (position embeddings of another grid are resampled). The
    classifier is left as it is where the file has none or one of another size. Raises `UserError` where the file
    cannot be read or does not fit the model.
    """
    state = _read(Path(path))
    own = {name.removeprefix(OWN_PREFIX): tensor for name, tensor in state.items() if name.startswith(OWN_PREFIX)}
    state = _converted(model, own or state, path=path)
    expected = model.state_dict()
    classifier = {name for name in expected if name.startswith(_classifier_names(model))}
    for name in classifier & state.keys():
        if state[name].shape != expected[name].shape:
            del state[name]
    wrong = [name for name in expected.keys() & state.keys() if expected[name].shape != state[name].shape]
    missing = expected.keys() - state.keys() - classifier
    unexpected = state.keys() - expected.keys() - {name for name in state if name.startswith(_classifier_names(model))}
    if wrong or missing or unexpected:
        named = sorted([*wrong, *missing, *unexpected])
        raise UserError(
            f"model.weights {path} does not fit the model: {len(missing)} tensors missing, {len(unexpected)} unknown, "
            f"{len(wrong)} of another shape ({', '.join(named[:5])}); give weights of this very model and arguments"
        )
    model.load_state_dict({**expected, **{name: tensor for name, tensor in state.items() if name in expected}})


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"model.weights {path} is no file: give the path of a safetensors file or a PyTorch state dict")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        _refuse_bomb(path)
        found = torch.load(path, map_location="cpu", weights_only=True)  # no code: tensors, numbers and text alone
    except UNREADABLE as error:
        raise UserError(f"model.weights {path} cannot be read ({type(error).__name__}: {error})") from error
    for key in WRAPPERS:
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"model.weights {path} holds no state dict of tensors; save the model's state_dict() alone")
    size_bytes = path.stat().st_size
    for name, tensor in found.items():
        if tensor.layout != torch.strided or tensor.numel() * tensor.element_size() > size_bytes:
            raise UserError(f"model.weights {path}: {name} claims {tuple(tensor.shape)}, more than the file can hold")
    return {str(name).removeprefix("module."): tensor for name, tensor in found.items()}


def _refuse_bomb(path: Path) -> None:
    """Raises ValueError for a PyTorch file that unpacks to more than it holds: PyTorch compresses nothing."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size_bytes = sum(info.file_size for info in archive.infolist())
        if size_bytes > path.stat().st_size:
            raise ValueError(f"its parts unpack to {size_bytes:,} bytes")


def _converted(model: nn.Module, state: dict[str, Tensor], *, path: str) -> dict[str, Tensor]:
    """The state dict after the conversion that timm keeps beside each model family, where there is one."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None or len(inspect.signature(convert).parameters) < 2:
        return dict(state)
    try:
        return dict(convert(state, model))
    except (RuntimeError, KeyError, AssertionError, ValueError) as error:
        raise UserError(f"model.weights {path} does not fit the model ({type(error).__name__}: {error})") from error


def _classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the classifier's tensors, as the model's own configuration names them."""
    names = model.pretrained_cfg.get("classifier") or ()  # type: ignore[operator, union-attr]
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))
