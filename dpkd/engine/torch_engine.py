"""The plain PyTorch engine, the reference: every rank holds everything."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpkd.engine.network import InPrecision, prepare
from dpkd.engine.optimizer import ParameterGroup, build_optimizer, by_name, set_learning_rates
from dpkd.engine.protocol import Statistics
from dpkd.engine.settings import EngineSettings, OptimizerSettings
from dpkd.engine.slots import Replicated, TrainingState
from dpkd.engine.state import Writer
from dpkd.engine.world import World


class TorchEngine:
    """Plain PyTorch behind the verbs of `Engine`; one all-reduce averages the gradients."""

    def __init__(
        self,
        module: nn.Module,
        *,
        parameter_groups: Sequence[ParameterGroup],
        optimizer: OptimizerSettings,
        settings: EngineSettings,
        world: World,
        accumulation: int,
        micro_batch_size: int,  # noqa: ARG002 (part of what every engine is given; DeepSpeed's configuration asks for it)
        precision: str,
        statistics: Statistics | None = None,
    ) -> None:
        prepare(module, settings=settings, world=world)
        if settings.compile:
            module.compile()
        self.module = module
        self._network = InPrecision(module, device=world.device, precision=precision)
        self._world, self._accumulation, self._statistics = world, accumulation, statistics
        self._clip = optimizer.clip or float("inf")
        trained = by_name(parameter_groups)
        self._parameters = list(trained.values())
        self._optimizer = build_optimizer(parameter_groups, optimizer, fused=world.device.type == "cuda")
        self._state = TrainingState(
            module,
            trained=trained,
            placement=Replicated(self._optimizer),
            optimizer=optimizer,
            decay=settings.ema,
            world=world,
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.module.train()
        if self._statistics is not None:
            self._statistics.before_micro()
        outputs = self._network(*args, **kwargs)
        if self._statistics is not None:
            self._statistics.after_micro()
        return outputs

    @torch.no_grad()
    def predict(self, *args: Any, **kwargs: Any) -> Any:
        self.module.eval()
        with self._state.average_in_place():
            return self._network(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self._accumulation).backward()

    def step(self, *, learning_rate: float) -> torch.Tensor:
        self._average_gradients()
        norm = nn.utils.clip_grad_norm_(self._parameters, self._clip)
        set_learning_rates(self._optimizer, learning_rate)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._statistics is not None:
            self._statistics.commit(self._world.mean_)
        self._state.after_update()
        return norm

    def _average_gradients(self) -> None:
        gradients = []
        for parameter in self._parameters:
            if parameter.grad is None:  # no loss reached it on this rank, one may have on another
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        if self._world.size > 1:
            mean = self._world.mean_(torch.cat([gradient.reshape(-1) for gradient in gradients]))
            parts = mean.split([gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def snapshot(self) -> Writer:
        return self._state.snapshot()

    def load(self, folder: Path) -> None:
        self._state.load(folder)

    def weights(self) -> dict[str, torch.Tensor]:
        return self._state.weights()
