"""Batch-norm running statistics that do not depend on the number of ranks or on accumulation."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class StepStatistics:
    """Moves running statistics once a step: `(1 - m) · old + m · mean over all micro-batches and ranks`.

    Plain batch norm moves them once a forward pass, with what its own rank saw, so a run on two ranks ends with others
    than a run on one. Call `before_micro` and `after_micro` around every training forward and `commit` once a step, on
    all ranks. Until the commit the statistics of the last step stand, for an evaluation within the step too.
    The norms' momentum is taken over: outside of those calls nothing moves the statistics.
    """

    def __init__(self, module: nn.Module) -> None:
        self._norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm) and norm.track_running_stats]
        self._momenta = [norm.momentum for norm in self._norms]
        self._kept: list[Tensor] = []
        self._sums: list[Tensor] = []
        self._counts: list[Tensor] = []
        self._num_micros = 0
        # 0 and not the true one: activation checkpointing runs forwards again, within the backward
        self._set_momentum(0.0)

    def before_micro(self) -> None:
        """Lets the next forward leave its own batch's statistics in the buffers."""
        if not self._num_micros:
            self._counts = [counter.clone() for counter in self._counters()]
        self._kept = [buffer.clone() for buffer in self._buffers()]
        self._set_momentum(1.0)

    def after_micro(self) -> None:
        """Adds what the forward left to the step's sums, and puts the last step's statistics back."""
        assert self._kept or not self._norms, "after_micro without before_micro"
        seen = [buffer.clone() for buffer in self._buffers()]
        self._sums = [total + new for total, new in zip(self._sums, seen, strict=True)] if self._num_micros else seen
        self._num_micros += 1
        _write(self._buffers(), self._kept)
        self._kept = []
        self._set_momentum(0.0)

    def commit(self, average: Callable[[Tensor], Tensor]) -> None:
        """Ends the step; `average` gives a vector's mean over ranks and is called once, not at all without a norm."""
        if not self._norms:
            return
        assert self._num_micros, "commit without a micro-batch"
        mean = average(torch.cat(self._sums) / self._num_micros)
        counts = [count + 1 for count in self._counts]
        moved = []
        for position, new in enumerate(mean.split([len(total) for total in self._sums])):
            momentum, count = self._momenta[position // 2], counts[position // 2]
            share = momentum if momentum is not None else 1 / count  # none: the plain mean over all steps
            moved.append((1 - share) * self._buffers()[position] + share * new)
        _write(self._buffers(), moved)
        # steps are what counts, and each forward counted itself
        _write(self._counters(), counts)
        self._num_micros = 0

    def _set_momentum(self, momentum: float) -> None:
        for norm in self._norms:
            norm.momentum = momentum

    def _buffers(self) -> list[Tensor]:
        """Mean and variance of each norm, in turn."""
        pairs = [(norm.running_mean, norm.running_var) for norm in self._norms]
        return [buffer for pair in pairs for buffer in pair if buffer is not None]

    def _counters(self) -> list[Tensor]:
        return [norm.num_batches_tracked for norm in self._norms if norm.num_batches_tracked is not None]


def _write(buffers: list[Tensor], values: list[Tensor]) -> None:
    # through .data: autograd saved the buffers for the backward that is still to come
    for buffer, value in zip(buffers, values, strict=True):
        buffer.data.copy_(value)
