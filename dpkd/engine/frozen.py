"""A network that no longer learns, such as a frozen teacher."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Frozen:
    """A network that only predicts; its weights may be sharded over the ranks, so all ranks predict together."""

    spec: Any
    """What the network was built from."""
    runner: nn.Module
    """Runs it in evaluation mode, in its precision, with fp32 outputs."""

    @torch.no_grad()
    def predict(self, *inputs: Tensor) -> dict[str, Tensor]:
        """The network's outputs, without gradients; every rank calls it equally often."""
        outputs: dict[str, Tensor] = self.runner(*inputs)
        return outputs
