"""The engine protocol: one network in training, its optimizer, and how both are spread over the ranks."""

from typing import Any, Protocol

import torch
from torch import nn

from dpkd.engine.slots import TrainingState


class Engine(Protocol):
    """Trains one network. Every verb is called by all ranks together, in the same order.

    Batch-norm statistics do not depend on how a step is cut into micro-batches and ranks (batch_norm.py).
    """

    module: nn.Module
    state: TrainingState
    """Its weights, optimizer and average: a part of checkpoints, and what gives the weights."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the network in training mode, in the engine's precision; floating-point outputs come as fp32."""

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the network in evaluation mode without gradients, with the averaged weights where there are any."""

    def backward(self, loss: torch.Tensor) -> None:
        """Adds this micro-batch's gradient; `loss` is its mean, the engine divides by the accumulation."""

    def step(self, *, learning_rate: float) -> torch.Tensor:
        """Averages gradients over ranks, clips, updates the weights; returns the gradient norm before clipping.

        Called once after `accumulation` calls of `backward`. The norm is a scalar on the engine's device, the same on
        every rank; reading it waits for the device. Not finite means that the weights are spoilt: stop, and go back to
        a checkpoint.
        """
