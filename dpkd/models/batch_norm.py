"""Batch-norm running statistics that do not depend on the number of ranks or on accumulation."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class StepStatistics:
    """Moves running statistics once a step: `(1 - m) · old + m · mean over all micro-batches and ranks`.

    Plain batch norm moves them once a forward pass, with what its own rank saw, so a run on two ranks ends with others
    than a run on one. Call `before_micro` and `after_micro` around every training forward and `commit` once a step, on
    all ranks. Between steps, and in evaluation within one, the statistics of the last step stand.
    """

    def __init__(self, module: nn.Module) -> None:
        self._norms = [
            norm for norm in module.modules() if isinstance(norm, _BatchNorm) and norm.running_mean is not None
        ]
        self._momenta = [norm.momentum for norm in self._norms]
        self._sums: list[Tensor] = []
        self._kept: list[Tensor] = []
        self._num_micros = 0

    def before_micro(self) -> None:
        """Makes the next forward leave its own batch's statistics in the buffers."""
        self._kept = [buffer.clone() for buffer in self._buffers()]
        for norm in self._norms:
            norm.momentum = 1.0

    def after_micro(self) -> None:
        """Counts what the forward left, and puts the last step's statistics back."""
        assert self._kept or not self._norms, "after_micro without before_micro"
        seen = [buffer.clone() for buffer in self._buffers()]
        self._sums = [a + b for a, b in zip(self._sums, seen, strict=True)] if self._sums else seen
        self._num_micros += 1
        self._write(self._kept)
        self._kept = []
        for norm, momentum in zip(self._norms, self._momenta, strict=True):
            norm.momentum = momentum

    def commit(self, average: Callable[[Tensor], Tensor]) -> None:
        """Ends the step; `average` gives the mean of a vector over all ranks, and is called once if there is a norm."""
        if not self._norms:
            return
        assert self._num_micros, "commit without a micro-batch"
        mean = average(torch.cat([total.flatten() for total in self._sums]) / self._num_micros)
        parts = mean.split([total.numel() for total in self._sums])
        moved = []
        for position, (old, part) in enumerate(zip(self._buffers(), parts, strict=True)):
            momentum = self._momentum(position // 2)
            moved.append((1 - momentum) * old + momentum * part.view_as(old))
        self._write(moved)
        for norm in self._norms:
            assert norm.num_batches_tracked is not None
            norm.num_batches_tracked.data += 1
        self._sums, self._num_micros = [], 0

    def _momentum(self, position: int) -> float:
        """The share of the new statistics; a norm without momentum keeps a plain mean over its steps."""
        momentum = self._momenta[position]
        if momentum is not None:
            return momentum
        tracked = self._norms[position].num_batches_tracked
        assert tracked is not None
        return 1.0 / (int(tracked) + 1)

    def _buffers(self) -> list[Tensor]:
        return [buffer for norm in self._norms for buffer in (norm.running_mean, norm.running_var) if buffer is not None]

    def _write(self, values: list[Tensor]) -> None:
        # through .data: autograd saved the buffers for the backward that is still to come
        for buffer, value in zip(self._buffers(), values, strict=True):
            buffer.data.copy_(value)
