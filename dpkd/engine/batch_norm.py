"""Batch-norm running statistics that do not depend on the number of ranks or on accumulation."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.profiler import record_function


class StepStatistics:
    """Updates running statistics once per step: `(1 - m) · old + m · mean over all micro-batches and ranks`.

    Plain batch norm updates them in every forward pass from the samples of one rank, so runs on one and on two ranks
    end with different statistics. Run every training forward within `micro_batch`, and call `commit` once per step, on
    all ranks. Until the commit the buffers hold the statistics of the last step, also for an evaluation within the
    step. This class sets the momentum of the norms, so nothing else updates the statistics. It keeps the statistics of
    all norms in one vector, of which the buffers of the norms are views: a step costs a few operations for any network.
    """

    def __init__(self, module: nn.Module) -> None:
        self._norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm) and norm.track_running_stats]
        if not self._norms:
            return
        self._flat, sizes = _flatten(self._norms)
        self._counters = torch.stack([count for norm in self._norms if (count := norm.num_batches_tracked) is not None])
        for norm, counter in zip(self._norms, self._counters, strict=True):
            norm.num_batches_tracked = counter.data
        self._momenta, self._sizes = [norm.momentum for norm in self._norms], sizes.to(self._flat.device)
        self._shares = self._share_of_step()
        self._sum: Tensor | None = None
        self._num_micros = 0
        # momentum 0: activation checkpointing repeats forwards within the backward
        self._set_momentum(0.0)

    @contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Adds the statistics of the body, which is one training forward, to the sums of the step."""
        if not self._norms:
            yield
            return
        if self._sum is None:
            self._counts = self._counters.clone()
        last_step = self._flat.clone()
        self._set_momentum(1.0)  # the forward writes the statistics of its batch to the buffers
        yield
        self._sum = self._flat.clone() if self._sum is None else self._sum.add_(self._flat)
        self._num_micros += 1
        self._flat.copy_(last_step)
        self._set_momentum(0.0)

    def commit(self, average: Callable[[Tensor], Tensor]) -> None:
        """Ends the step; calls `average`, which returns a vector's mean over ranks, once, or never without a norm."""
        if not self._norms:
            return
        assert self._sum is not None, "commit without a micro-batch"
        with record_function("dpkd: batch-norm statistics"):
            mean = average(self._sum / self._num_micros)
            self._counters.copy_(self._counts.add_(1))  # count steps: each forward has counted itself
            share, rest = self._share_of_step() if None in self._momenta else self._shares
            self._flat.mul_(rest).add_(mean * share)
        self._sum, self._num_micros = None, 0

    def _share_of_step(self) -> tuple[Tensor, Tensor]:
        """The share of the step in each statistic, and 1 minus it, as vectors."""
        shares = [
            1 / max(1, int(count)) if momentum is None else momentum  # None: the plain mean over all steps
            for momentum, count in zip(self._momenta, self._counters, strict=True)
        ]
        share, rest = torch.tensor([shares, [1 - share for share in shares]], device=self._flat.device)
        return share.repeat_interleave(self._sizes), rest.repeat_interleave(self._sizes)

    def _set_momentum(self, momentum: float) -> None:
        for norm in self._norms:
            vars(norm)["momentum"] = momentum  # without the search of nn.Module through its parameters


def _flatten(norms: Sequence[_BatchNorm]) -> tuple[Tensor, Tensor]:
    """Moves the mean and variance of every norm to one vector; returns it, and the length of each norm's part.

    The buffers become views of the vector. Each begins at a multiple of 256 bytes, as memory of its own would.
    """
    buffers = [(norm, name) for norm in norms for name in ("running_mean", "running_var")]
    tensors = [getattr(norm, name) for norm, name in buffers]
    padded = [F.pad(tensor, (0, -len(tensor) % 64)) for tensor in tensors]
    flat = torch.cat(padded)
    for (norm, name), tensor, part in zip(buffers, tensors, flat.split([len(pad) for pad in padded]), strict=True):
        # .data: autograd must not see the writes to the vector, as it has saved the buffers for the coming backward
        setattr(norm, name, part[: len(tensor)].data)
    return flat, torch.tensor([2 * len(pad) for pad in padded[::2]])
