"""The engine protocol: one network in training and its optimizer, distributed over the ranks."""

from typing import Any, Protocol

import torch
from torch import nn

from dpkd.engine.slots import TrainingState


class Engine(Protocol):
    """Trains one network. All ranks call every method together, in the same order.

    Batch-norm statistics do not depend on the numbers of micro-batches and ranks in a step (batch_norm.py).
    """

    module: nn.Module
    state: TrainingState
    """Weights, optimizer state and average of the network; a part of checkpoints, and the source of its weights."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the network in training mode, in the engine's precision; returns floating-point outputs as fp32."""

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the network in evaluation mode without gradients, with the averaged weights if there are any."""

    def backward(self, loss: torch.Tensor) -> None:
        """Adds this micro-batch's gradient; `loss` is a mean over it, and the engine divides by the accumulation."""

    def step(self, *, learning_rate: float) -> torch.Tensor:
        """Averages gradients over ranks, clips, updates the weights; returns the gradient norm before clipping.

        Call it once after `accumulation` calls of `backward`. The norm is a scalar on the engine's device, the same on
        every rank; reading it waits for the device. If it is not finite, the weights are spoilt: stop, and return to a
        checkpoint.
        """
