"""Tiny models with random weights, as a user might bring them."""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from dpkd.priors.learned import Learned, OnnxModel, TimmModel

SIZE = 32
VIT: dict[str, Any] = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
VIT_NAME = "vit_tiny_patch16_224"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Edges(nn.Module):
    """Two side outputs at half size, as logits; symmetric, so that a mirrored image has the mirrored output."""

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, 1, 4, stride=2, padding=1), nn.Conv2d(3, 1, 6, stride=2, padding=2)
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for convolution in (self.fine, self.coarse):
                weight = torch.randn(convolution.weight.shape, generator=draw)
                convolution.weight.copy_((weight + weight.flip(3)) / 4)
                convolution.bias.zero_()

    def forward(self, image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        return self.fine(image_BCHW), self.coarse(image_BCHW)


class Depth(nn.Module):
    """A map without a channel axis, of no particular range."""

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 5, padding=2, stride=2), nn.GELU(), nn.Conv2d(8, 1, 3, padding=1))

    def forward(self, image_BCHW: Tensor) -> Tensor:
        return 10 * self.layers(image_BCHW)[:, 0] + 3


def save_vit(path: Path, *, seed: int = 0) -> nn.Module:
    """Saves the weights of a small ViT as safetensors; returns the model."""
    torch.manual_seed(seed)
    model = timm.create_model(VIT_NAME, num_classes=0, img_size=SIZE, **VIT).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # fresh attention is all but even
            parameter.add_(0.3 * torch.randn_like(parameter))
    safetensors.torch.save_file(model.state_dict(), path)
    return model


def save_onnx(path: Path, model: nn.Module, *, batch_size: int | None = None, external_data: bool = False) -> nn.Module:
    """Saves the model as ONNX, for one batch size or for any; returns it."""
    torch.onnx.export(
        model.eval(),
        (torch.zeros(batch_size or 2, 3, SIZE, SIZE),),
        path,
        input_names=["image"],
        dynamic_shapes=None if batch_size else ({0: torch.export.Dim("batch", max=64)},),
        external_data=external_data,
        verbose=False,
    )
    return model


def save_edges(path: Path, *, seed: int = 0) -> Edges:
    """Saves the edge model as ONNX, exported once a process; returns it."""
    path.write_bytes(_exported_edges(seed))
    return Edges(seed=seed)


@cache
def _exported_edges(seed: int) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        save_onnx(Path(folder) / "edges.onnx", Edges(seed=seed))
        return (Path(folder) / "edges.onnx").read_bytes()


def attention_prior(path: Path, **changes: Any) -> Learned:
    """Class attention of the ViT saved at `path`."""
    model = TimmModel(name=VIT_NAME, arguments=VIT, file=str(path), **changes.pop("model", {}))
    return Learned(**{"of": "attention", "model": model, "size": SIZE, "batch_size": 4, **changes})


def edge_prior(path: Path, **changes: Any) -> Learned:
    """The coarse side output of the edge model saved at `path`."""
    model = OnnxModel(file=str(path), **{"output": 1, **changes.pop("model", {})})
    given = {"of": "edges", "model": model, "size": SIZE, "scale": "sigmoid", "batch_size": 4}
    return Learned(**{**given, **changes})


def depth_prior(path: Path, **changes: Any) -> Learned:
    """The depth model saved at `path`."""
    model = OnnxModel(file=str(path), **changes.pop("model", {}))
    return Learned(**{"of": "depth", "model": model, "size": SIZE, "scale": "minmax", "batch_size": 4, **changes})
