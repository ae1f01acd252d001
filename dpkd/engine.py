"""The engine protocol: one network, its optimizer, and how both are spread over the ranks."""

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn


class Engine(Protocol):
    """Trains one network. Every verb is called by all ranks together, in the same order."""

    module: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the network in training mode, in the engine's precision."""

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the network in evaluation mode without gradients, with the averaged weights where there are any."""

    def backward(self, loss: torch.Tensor) -> None:
        """Adds this micro-batch's gradient; `loss` is its mean, the engine divides by the accumulation."""

    def step(self, *, learning_rate: float) -> float:
        """Averages gradients over ranks, clips, updates the weights; returns the gradient norm before clipping."""

    def save(self, folder: Path) -> None:
        """Writes this rank's share of weights, optimizer and average into `folder`; file names differ between ranks."""

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote, bit for bit at the same world size."""

    def weights(self) -> dict[str, torch.Tensor]:
        """The whole fp32 state dict on CPU (the averaged weights where there are any), the same on every rank."""
