"""The export of students: a folder that plain timm loads, and ONNX, both checked before publication.

    export/<student>/
      model.safetensors    the weights of the timm model
      config.json          architecture, arguments, classes, preprocessing, as timm writes them for the Hugging Face Hub
      README.md            model card with the numbers measured in this run
      model.onnx           optional; image (and the prior map, for figure-ground pooling) -> embedding, logits, and
                           segmentation [B, K, h, w] if it has that head, whose files `dpkd.stages.masks` writes

Axes: B image, C channel, H W height and width, D feature.
"""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from dpkd.data.settings import Window
from dpkd.errors import UserError
from dpkd.evaluation.exported import MULTI_LABEL
from dpkd.io import storage
from dpkd.log import logger
from dpkd.models.network import Network
from dpkd.models.onnx_file import difference_of, write_module
from dpkd.models.saved import load_network
from dpkd.models.settings import FigureGroundPooling, NetworkSpec
from dpkd.report.model_card import model_card
from dpkd.report.summary import figure_or_none
from dpkd.stages.evaluate import read_evaluation
from dpkd.stages.masks import HEAD, head_card, write_head
from dpkd.stages.plan import stages_of
from dpkd.stages.run import Run

TIMM_TOLERANCE = 1e-5
DEEP_IMAGES = """\

## Images of more than 8 bits

This student was trained on images whose values from {low:g} (black) to {high:g} (white) were mapped to 0 to 255. Map
yours the same way before the code above; `dpkd predict`, `embed` and `adapt` do so.
"""
OF_DOWNLOADS = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
"""Arguments of `timm.create_model` with the source of weights; timm sets them for a folder."""


def export(run: Run) -> None:
    """Writes and checks every student's folder, whole or not at all; only rank 0 calls it.

    Raises `UserError` if the written model does not give the outputs of the student.
    """
    settings = run.settings.export
    assert settings is not None, "the stage is left out without settings"
    unmeasured = not stages_of(run.settings, ["evaluate"]) or run.folder.stages().get("evaluate", {}).get("made") == {}
    evaluation = None if unmeasured else read_evaluation(run.folder)  # without a label evaluate makes no file
    window = run.data.window
    for name in run.settings.distill.students:
        network = load_network(run.folder.students / name)
        spec = network.spec
        with run.folder.scratch(f"export-{name}") as scratch:
            write_timm_folder(scratch, network, window=window)
            difference = None
            if settings.onnx:
                onnx = scratch / "model.onnx"
                difference = write_onnx(onnx, network, map_size=run.map_size, tolerance=settings.tolerance)
            plain = spec.model_dump(mode="json")
            card = partial(model_card, name, evaluation=evaluation, spec=plain, onnx_difference=difference)
            text = figure_or_none(f"model card of {name}", card) or f"# {name}\n"
            if HEAD in network.heads and run.data.masks is not None:
                write_head(scratch, network, run.data.masks)
                text += head_card(name, network, run.data.masks)
            if window is not None:
                text += DEEP_IMAGES.format(low=window.low, high=window.high)
            (scratch / "README.md").write_text(text)
            run.folder.check_fence()
            _replace(run.folder.export / name, scratch)
        logger.info(f"export: {run.folder.export / name}")


def _replace(folder: Path, scratch: Path) -> None:
    """Replaces an earlier export by the folder `scratch`.

    Changes nothing if a newer attempt has removed `scratch`.
    """
    new = folder.with_name(f".{folder.name}.new")
    storage.remove_tree(new)
    storage.publish(scratch, new)
    storage.remove_tree(folder)
    storage.publish(new, folder)


def write_timm_folder(folder: Path, network: Network, *, window: Window | None = None) -> None:
    """Writes `model.safetensors` and `config.json`, from which timm computes the network's embedding and logits.

    `config.json` also holds the window by which images of more than 8 bits become its inputs.
    For a figure-ground network they are those of a blank map, which weighs all patches equally. Raises `UserError` if
    the timm model has no such pooling.
    """
    spec, backbone = network.spec, network.backbone
    tensors = {name: tensor.contiguous().clone() for name, tensor in backbone.timm.state_dict().items()}
    (folder / "model.safetensors").write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))
    pretrained_cfg = backbone.timm.pretrained_cfg
    config = {
        "architecture": spec.model.name.split(".")[0],
        "num_classes": len(spec.classes),
        "num_features": backbone.embedding_dim,
        "label_names": list(spec.classes),
        **({"problem_type": MULTI_LABEL} if spec.multi_label else {}),
        **({"window": window.model_dump()} if window is not None else {}),
        "model_args": {},
        "pretrained_cfg": {
            "input_size": [3, spec.image_size, spec.image_size],
            "fixed_input_size": bool(pretrained_cfg.get("fixed_input_size", False)),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(spec.mean),
            "std": list(spec.std),
            "num_classes": len(spec.classes),
            "pool_size": None,
            "first_conv": pretrained_cfg.get("first_conv"),
            "classifier": pretrained_cfg.get("classifier"),
            "custom_load": False,
        },
    }
    image_BCHW, weight_B1HW = _inputs(spec, batch_size=2, map_size=1)
    with torch.inference_mode():
        expected = network(image_BCHW, torch.zeros_like(weight_B1HW))
    smallest = math.inf
    for arguments in _possible_arguments(spec):
        (folder / "config.json").write_text(json.dumps(config | {"model_args": arguments}, indent=2) + "\n")
        try:
            model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
            with torch.inference_mode():
                embedding_BD = model.forward_head(model.forward_features(image_BCHW), pre_logits=True)
                outputs = {"embedding": embedding_BD, "logits": model(image_BCHW)}
        except (RuntimeError, TypeError, AssertionError):  # the model does not accept these arguments or this size
            continue
        smallest = min(smallest, max(difference_of(outputs[name], expected[name]) for name in _output_names(spec)))
        if smallest <= TIMM_TOLERANCE:
            return
    raise UserError(
        f"model {spec.model.name!r} cannot be exported as a timm folder: the outputs of timm differ by {smallest:.2g} "
        "of the largest; use a model with mean pooling (model.arguments.global_pool=avg)"
    )


def _possible_arguments(spec: NetworkSpec) -> list[dict[str, Any]]:
    """Possible arguments of `timm.create_model` besides the name, most likely first.

    Most convolutional models do not accept an image size. A transformer that reads its class token must pool its
    patches if it was trained with figure-ground pooling, and keep its norm before the pooling (`fc_norm`).
    """
    arguments = {key: value for key, value in spec.model.arguments.items() if key not in OF_DOWNLOADS}
    poolings: list[dict[str, Any]] = [{}]
    if isinstance(spec.model.pooling, FigureGroundPooling):
        poolings += [{"global_pool": "avg"}, {"global_pool": "avg", "fc_norm": False}]
    return [size | arguments | pooling for size in ({"img_size": spec.image_size}, {}) for pooling in poolings]


class _ForOnnx(nn.Module):
    """A network whose outputs are a tuple, as ONNX needs: embedding, and logits if there are classes."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, image_BCHW: Tensor, weight_B1HW: Tensor | None = None) -> tuple[Tensor, ...]:
        outputs = self.network(image_BCHW, weight_B1HW)
        return tuple(outputs[name] for name in _output_names(self.network.spec, with_head=True))


def write_onnx(path: Path, network: Network, *, map_size: int, tolerance: float) -> float:
    """Writes a network as ONNX for any batch size; returns its largest relative difference from PyTorch.

    Inputs: `image` [B, 3, S, S], normalised; `weight` [B, 1, map_size, map_size] in [0, 1] for figure-ground pooling.
    Outputs: `embedding` [B, D], `logits` [B, K], `segmentation` [B, K, h, w]. Raises `UserError` above the tolerance.
    """
    names = ["image", "weight"] if isinstance(network.spec.model.pooling, FigureGroundPooling) else ["image"]
    try:
        return write_module(
            path,
            _ForOnnx(network).eval(),
            lambda batch_size: _inputs(network.spec, batch_size=batch_size, map_size=map_size)[: len(names)],
            names=(names, _output_names(network.spec, with_head=True)),
            tolerance=tolerance,
        )
    except UserError as error:
        raise UserError(f"{error}; raise export.tolerance, or set export.onnx=false") from error
    except Exception as error:  # the exporter raises any error for a model that it cannot write
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(
            f"{network.spec.model.name!r} cannot be written as ONNX ({cause}): set export.onnx=false"
        ) from error


def _output_names(spec: NetworkSpec, *, with_head: bool = False) -> list[str]:
    return ["embedding"] + ["logits"] * bool(spec.classes) + [HEAD] * (with_head and HEAD in spec.heads)


def _inputs(spec: NetworkSpec, *, batch_size: int, map_size: int) -> tuple[Tensor, Tensor]:
    """Random normalised images and weight maps, the same in every call."""
    shape = (batch_size, 3, spec.image_size, spec.image_size)
    image_BCHW = np.random.default_rng(0).standard_normal(shape, np.float32)
    weight_B1HW = np.random.default_rng(1).random((batch_size, 1, map_size, map_size), np.float32)
    return torch.from_numpy(image_BCHW), torch.from_numpy(weight_B1HW)
