"""One micro-batch: views of the images by name, each with its prior maps, and targets by name.

Axes: B images of a micro-batch, V views of one kind, C channels, H and W pixels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Change = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class View:
    """One kind of view of a batch: V views of each image, as V blocks of B."""

    image_BCHW: torch.Tensor
    """uint8 RGB, [V·B, 3, H, W]; `augment.normalise` makes it the network's input."""
    maps: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Prior maps by name, float32 [V·B, C, h, w] at the map size, region labels included; NaN if unknown."""
    normalised: dict[Any, torch.Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    """The images as the input of networks, by mean and deviation: `network_inputs` computes each once."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch."""

    views: Mapping[str, View]
    """By name; always has `global`."""
    targets: Mapping[str, torch.Tensor]
    """Learning targets by name; `class` is int64 [B], -1 without a visible label; `labels` is int64 [B, K]."""
    index_B: torch.Tensor
    """int64 sample of the split."""
    epoch_B: torch.Tensor
    """int64 count of earlier draws of the sample; 0 in evaluation."""

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, so that copies to a GPU overlap with computation."""
        return self._map(torch.Tensor.pin_memory)

    def first(self, count: int) -> "Batch":
        """At most `count` images, each in its first view of each kind."""
        return self._map(lambda tensor: tensor[:count])

    def with_shifted_maps(self) -> "Batch":
        """The same batch, in which each image has the prior maps of the previous image: a control experiment."""
        size = len(self.index_B)

        def shifted(map_BCHW: torch.Tensor) -> torch.Tensor:
            return map_BCHW.unflatten(0, (-1, size)).roll(1, dims=1).flatten(0, 1)

        return self._map(lambda tensor: tensor, change_map=shifted)

    def _map(self, change: Change, *, change_map: Change | None = None) -> "Batch":
        of_map = change_map or change
        views = {
            name: View(change(view.image_BCHW), {key: of_map(map_BCHW) for key, map_BCHW in view.maps.items()})
            for name, view in self.views.items()
        }
        targets = {name: change(target) for name, target in self.targets.items()}
        return Batch(views, targets, change(self.index_B), change(self.epoch_B))
