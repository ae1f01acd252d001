"""Batch-norm running statistics that do not depend on the number of ranks or on accumulation."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.profiler import record_function


class StepStatistics:
    """Updates running statistics once per step: `(1 - m) · old + m · mean over all micro-batches and ranks`.

    Plain batch norm updates them in every forward pass from the samples of one rank, so runs on one and on two ranks
    end with different statistics. Run every training forward within `micro_batch`, and call `commit` once per step, on
    all ranks. Until the commit the buffers hold the statistics of the last step, also for an evaluation within the
    step. This class sets the momentum of the norms, so nothing else updates the statistics.
    """

    def __init__(self, module: nn.Module) -> None:
        self._norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm) and norm.track_running_stats]
        self._momenta = [norm.momentum for norm in self._norms]
        self._sums: list[Tensor] = []
        self._counts: list[Tensor] = []
        self._num_micros = 0
        # momentum 0: activation checkpointing repeats forwards within the backward
        self._set_momentum(0.0)

    @contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Adds the statistics of the body, which is one training forward, to the sums of the step."""
        if not self._norms:
            yield
            return
        if not self._num_micros:
            self._counts = [counter.clone() for counter in self._counters()]
        last_step = [buffer.clone() for buffer in self._buffers()]
        self._set_momentum(1.0)  # the forward writes the statistics of its batch to the buffers
        yield
        buffers = self._buffers()
        if self._num_micros:
            torch._foreach_add_(self._sums, buffers)
        else:
            self._sums = [buffer.clone() for buffer in buffers]
        self._num_micros += 1
        torch._foreach_copy_(buffers, last_step)
        self._set_momentum(0.0)

    def commit(self, average: Callable[[Tensor], Tensor]) -> None:
        """Ends the step; calls `average`, which returns a vector's mean over ranks, once, or never without a norm."""
        if not self._norms:
            return
        assert self._num_micros, "commit without a micro-batch"
        with record_function("dpkd: batch-norm statistics"):
            self._commit(average)

    def _commit(self, average: Callable[[Tensor], Tensor]) -> None:
        mean = average(torch.cat(self._sums) / self._num_micros)
        torch._foreach_add_(self._counts, 1)
        shares = []
        for momentum, count in zip(self._momenta, self._counts, strict=True):
            share = float(1 / count) if momentum is None else momentum  # None: the plain mean over all steps
            shares += [share, share]  # mean and variance
        parts = zip(shares, mean.split([len(total) for total in self._sums]), strict=True)
        buffers = self._buffers()
        torch._foreach_mul_(buffers, [1 - share for share in shares])
        torch._foreach_add_(buffers, [share * new for share, new in parts])
        # count steps: each forward has counted itself
        torch._foreach_copy_(self._counters(), self._counts)
        self._num_micros = 0

    def _set_momentum(self, momentum: float) -> None:
        for norm in self._norms:
            norm.momentum = momentum

    def _buffers(self) -> list[Tensor]:
        """Mean and variance of each norm, alternating."""
        # .data: autograd has saved the buffers for the coming backward
        return [
            buffer.data
            for norm in self._norms
            for buffer in (norm.running_mean, norm.running_var)
            if buffer is not None
        ]

    def _counters(self) -> list[Tensor]:
        return [norm.num_batches_tracked.data for norm in self._norms if norm.num_batches_tracked is not None]
