"""Runs a timm model, or a saved torch program, on the CPU or on a GPU.

Axes: B image, C colour or channel, H W height and width.
"""

import io
import json
import re
import zipfile
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export.passes import move_to_device_pass

from dpkd.errors import UserError
from dpkd.models.attention import attends, with_attention
from dpkd.models.backbone import Backbone
from dpkd.models.settings import ModelSettings
from dpkd.priors.model_output import Array, Run, chosen
from dpkd.priors.model_settings import TimmModel, TorchModel

PLAIN = re.compile(
    r"models/.*\.json|archive_(format|version)|byteorder|\.data/(version|serialization_id)"
    r"|data/weights/weight_\d+|data/constants/tensor_\d+|data/(weights|constants)/.*_config\.json"
)
"""Members of an exported program that hold numbers and text alone."""
SAMPLE_INPUTS = "data/sample_inputs/"


def load_timm(model: TimmModel, *, size: int, device: str) -> Run:
    """The timm model as a function of images BCHW of that size; on the CPU it takes one thread.

    Raises `UserError` where the weights do not fit the model, or it has no class attention and that is its output.
    """
    settings = ModelSettings(name=model.name, arguments=model.arguments, weights=model.file)
    backbone = Backbone(settings, num_classes=0, image_size=size)
    if model.output == "attention" and not attends(backbone):
        raise UserError(f"the timm model {model.name!r} has no class attention that can be read; set output=energy")
    backbone = backbone.eval().to(device)

    def patches(image_BCHW: Tensor) -> Tensor:
        return backbone.patches(backbone.features(image_BCHW))

    def attention(image_BCHW: Tensor) -> Tensor:
        return with_attention(backbone, lambda: {"patch": patches(image_BCHW)})["attention"]

    def energy(image_BCHW: Tensor) -> Tensor:
        energy_B1HW = patches(image_BCHW).square().sum(1, keepdim=True)
        return energy_B1HW / energy_B1HW.amax((2, 3), keepdim=True).clamp(min=1e-12)

    return _on_arrays({"attention": attention, "energy": energy, "features": patches}[model.output], device=device)


def load_torch(model: TorchModel, *, device: str) -> Run:
    """The saved program as a function of images BCHW; on the CPU it takes one thread.

    Raises `UserError` for a file that is neither an exported program nor TorchScript, or holds pickles that could run
    code; calling it raises `UserError` where the program has not the output.
    """
    program = _exported(model.file, device) if _is_exported(model.file) else torch.jit.load(model.file, device).eval()
    return _on_arrays(lambda image_BCHW: chosen(_named(program(image_BCHW)), model.output), device=device)


def _on_arrays(network: Callable[[Tensor], Tensor], *, device: str) -> Run:
    if torch.device(device).type == "cpu":
        torch.set_num_threads(1)  # the pool has a process for every core

    @torch.no_grad()
    def run(image_BCHW: Array) -> Array:
        found = network(torch.from_numpy(image_BCHW).to(device))
        return np.asarray(found.float().cpu().numpy())

    return run


def _named(outputs: Any) -> dict[str, Tensor]:
    """The tensors that a program gives, by key or position."""
    if isinstance(outputs, Tensor):
        return {"0": outputs}
    if isinstance(outputs, (tuple, list)):
        return {str(position): each for position, each in enumerate(outputs)}
    if isinstance(outputs, dict):
        return outputs
    raise UserError(f"it gives a {type(outputs).__name__}, and a tensor, or several in a tuple or dict, are taken")


def _is_exported(file: str) -> bool:
    """Whether the file is an exported program rather than TorchScript; raises `UserError` where it is neither."""
    names = [name for name, _ in _members(file)]
    if "archive_format" not in names and "constants.pkl" not in names:
        raise UserError(
            "it is neither a program of torch.export.save nor TorchScript, as no pickled module and no state dict is: "
            "export the model, or give the state dict of a timm model as kind=timm"
        )
    return "archive_format" in names


def _exported(file: str, device: str) -> Callable[[Tensor], Any]:
    """An exported program on a device; raises `UserError` where it holds pickles that torch would run."""
    for name, data in _members(file):
        if name.startswith(SAMPLE_INPUTS):
            torch.load(io.BytesIO(data()), weights_only=True)
        elif not PLAIN.fullmatch(name) or (name.endswith("_config.json") and _holds_pickle(data())):
            raise UserError(f"its part {name} may run code on loading; export the model anew, without custom objects")
    program = move_to_device_pass(torch.export.load(file), device)
    module: Callable[[Tensor], Any] = program.module()
    return module


def _members(file: str) -> list[tuple[str, Callable[[], bytes]]]:
    """(name without the archive's own folder, how to read it) of every part of a torch archive."""
    if not zipfile.is_zipfile(file):
        return []
    archive = zipfile.ZipFile(file)
    return [(name.partition("/")[2], partial(archive.read, name)) for name in archive.namelist()]


def _holds_pickle(config: bytes) -> bool:
    return any(payload.get("use_pickle") for payload in json.loads(config)["config"].values())
