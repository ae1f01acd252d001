"""The plain PyTorch engine, the reference: every rank holds the whole state."""

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dpkd.engine.batch_norm import StepStatistics
from dpkd.engine.network import InPrecision, prepare
from dpkd.engine.optimizer import ParameterGroup, build_optimizer, by_name, set_learning_rates
from dpkd.engine.settings import EngineSettings, OptimizerSettings
from dpkd.engine.slots import Replicated, TrainingState
from dpkd.engine.world import World


class TorchEngine:
    """The `Engine` of plain PyTorch.

    With `overlap` (by default on GPUs) DistributedDataParallel averages the gradients during the backward. Otherwise
    the gradients are views of one flat tensor, which one all-reduce averages in place: the buckets of
    DistributedDataParallel add in another order, so on gloo a run on three ranks would not resume bit for bit.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        parameter_groups: Sequence[ParameterGroup],
        optimizer: OptimizerSettings,
        settings: EngineSettings,
        world: World,
        accumulation: int,
        micro_batch_size: int,  # noqa: ARG002 (an argument of every engine; DeepSpeed needs it)
        precision: str,
        overlap: bool | None = None,
    ) -> None:
        prepare(module, settings=settings, world=world)
        if settings.compile:
            module.compile()
        self.module = module
        self._network = InPrecision(module, device=world.device, precision=precision)
        self._world, self._accumulation = world, accumulation
        self._statistics = StepStatistics(module)
        self._clip = optimizer.clip or float("inf")
        self._num_micros = 0
        trained = by_name(parameter_groups)
        self._parameters = list(trained.values())
        on_gpu = world.device.type == "cuda"
        self._optimizer = build_optimizer(parameter_groups, optimizer)
        self._buckets: DistributedDataParallel | None = None
        self._flat_gradient: torch.Tensor | None = None
        if world.size > 1 and (on_gpu if overlap is None else overlap):
            with warnings.catch_warnings():  # older versions of torch lack the new name of `broadcast_buffers`
                warnings.simplefilter("ignore", FutureWarning)
                self._buckets = DistributedDataParallel(
                    self._network, broadcast_buffers=False, find_unused_parameters=True, gradient_as_bucket_view=True
                )
        elif world.size > 1:
            sizes = [parameter.numel() for parameter in self._parameters]
            self._flat_gradient = self._parameters[0].new_zeros(sum(sizes))
            for parameter, part in zip(self._parameters, self._flat_gradient.split(sizes), strict=True):
                parameter.grad = part.view_as(parameter)
        self.state = TrainingState(
            module,
            trained=trained,
            placement=Replicated(self._optimizer),
            optimizer=optimizer,
            decay=settings.ema,
            world=world,
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.module.train()
        is_last = self._num_micros + 1 == self._accumulation
        with self._statistics.micro_batch():
            if self._buckets is None:
                return self._network(*args, **kwargs)
            with nullcontext() if is_last else self._buckets.no_sync():
                return self._buckets(*args, **kwargs)

    @torch.no_grad()
    def predict(self, *args: Any, **kwargs: Any) -> Any:
        self.module.eval()
        with self.state.average_in_place():
            return self._network(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self._accumulation).backward()
        self._num_micros += 1

    def step(self, *, learning_rate: float) -> torch.Tensor:
        assert self._num_micros == self._accumulation, (
            f"step after {self._num_micros} of {self._accumulation} backwards"
        )
        if self._flat_gradient is not None:
            self._world.mean_(self._flat_gradient)
        for parameter in self._parameters:
            if parameter.grad is None:  # no loss depends on it; its weights still decay
                parameter.grad = torch.zeros_like(parameter)
        norm = nn.utils.clip_grad_norm_(self._parameters, self._clip)
        set_learning_rates(self._optimizer, learning_rate)
        self._optimizer.step()
        if self._flat_gradient is not None:
            self._flat_gradient.zero_()
        else:
            self._optimizer.zero_grad()
        self._num_micros = 0
        self._statistics.commit(self._world.mean_)
        self.state.after_update()
        return norm
