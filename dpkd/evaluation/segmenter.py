"""Segments images with an exported student; needs timm, torch, NumPy and safetensors, and not dpkd."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file


class Segmenter(torch.nn.Module):
    """The timm model of an exported folder, with the head of `segmentation.safetensors`."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.settings = json.loads(Path(folder, "segmentation.json").read_text())
        self.model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        self.head = torch.nn.ParameterDict(load_file(Path(folder, "segmentation.safetensors")))

    def forward(self, image_B3HW: torch.Tensor) -> torch.Tensor:
        """Logits BKhw of normalised images, at the stride of the finest layer."""
        head, settings = self.head, self.settings
        levels = self.model.forward_intermediates(
            image_B3HW, indices=settings["layers"], output_fmt="NCHW", intermediates_only=True
        )
        total = torch.zeros((), device=image_B3HW.device)
        for i, level in enumerate(levels):
            lateral = F.conv2d(level, head[f"lateral_{i}_weight"], head[f"lateral_{i}_bias"])
            total = total + F.interpolate(lateral, size=levels[0].shape[2:], mode="bilinear")
        mixed = F.conv2d(total, head["mix_weight"], head["mix_bias"], padding=1)
        mixed = F.gelu(F.group_norm(mixed, settings["groups"], head["norm_weight"], head["norm_bias"]))
        return F.conv2d(mixed, head["out_weight"], head["out_bias"])

    def segment(self, image_HW3: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The class of each pixel, as a number in `settings["classes"]`, of an RGB image of any size."""
        return segment(self, image_HW3, **{key: self.settings[key] for key in ("size", "mean", "std", "tile")})


@torch.no_grad()
def segment(
    network: Callable[[torch.Tensor], torch.Tensor],
    image_HW3: NDArray[np.uint8],
    *,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    tile: int | None,
) -> NDArray[np.uint8]:
    """The likeliest class of each pixel, by the mean over square tiles of side `tile` that overlap by a quarter.

    A tile has at most the shorter side of the image, and is resized to `size` for the network.
    """
    height, width = image_HW3.shape[:2]
    side = min(height, width, tile or height + width)
    starts = [range(length - side + 1) for length in (height, width)]
    places = [np.linspace(0, at[-1], -(-at[-1] // max(1, side * 3 // 4)) + 1).round().astype(int) for at in starts]
    image_13HW = torch.from_numpy(np.moveaxis(image_HW3, 2, 0)[None]).float() / 255
    image_13HW = (image_13HW - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    total_KHW = torch.zeros(1)
    for top in places[0]:
        for left in places[1]:
            part = F.interpolate(
                image_13HW[:, :, top : top + side, left : left + side],
                size=(size, size),
                mode="bilinear",
                antialias=True,
            )
            share_KSS = F.interpolate(network(part).float(), size=(side, side), mode="bilinear").softmax(1)[0].cpu()
            if total_KHW.ndim == 1:
                total_KHW = torch.zeros(len(share_KSS), height, width)
            total_KHW[:, top : top + side, left : left + side] += share_KSS
    return total_KHW.argmax(0).byte().numpy()
