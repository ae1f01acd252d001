"""The plain PyTorch engine, and what every engine does to a network and its outputs."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpkd.engine.ema import WeightAverage
from dpkd.engine.optimizer import build_optimizer, by_name, quantities, set_learning_rates, set_num_updates, trainable
from dpkd.engine.protocol import Statistics
from dpkd.engine.settings import EngineSettings, OptimizerSettings
from dpkd.engine.state import Counts, Staging, StateReader, Writer, part_of, write_part
from dpkd.engine.world import World
from dpkd.errors import UserError


def use_activation_checkpointing(module: nn.Module) -> None:
    """Makes the network recompute activations in the backward pass, through timm's own switch."""
    switches: list[Any] = [
        part.set_grad_checkpointing for part in module.modules() if hasattr(part, "set_grad_checkpointing")
    ]
    reason = "this model has no such switch"
    if switches:
        try:
            switches[0]()
            return
        except AssertionError as error:  # how timm says that a model cannot
            reason = str(error)
    raise UserError(f"engine.activation_checkpointing=true: {reason}; set it to false for this model")


def in_fp32(outputs: Any) -> Any:
    """`outputs` (a tensor, or dicts, lists and tuples of them) with floating-point tensors as fp32, for the losses."""
    if isinstance(outputs, torch.Tensor):
        return outputs.float() if outputs.is_floating_point() else outputs
    if isinstance(outputs, dict):
        return {name: in_fp32(output) for name, output in outputs.items()}
    if isinstance(outputs, (list, tuple)):
        return type(outputs)(in_fp32(output) for output in outputs)
    return outputs


class TorchEngine:
    """Plain PyTorch, the reference: every rank holds everything, one all-reduce averages the gradients."""

    def __init__(
        self,
        module: nn.Module,
        *,
        parameter_groups: Sequence[Any],
        optimizer: OptimizerSettings,
        settings: EngineSettings,
        world: World,
        accumulation: int,
        micro_batch_size: int,  # noqa: ARG002 (part of what every engine is given; DeepSpeed's configuration asks for it)
        precision: str,
        statistics: Statistics | None = None,
    ) -> None:
        self.module = module.to(world.device)
        if settings.activation_checkpointing:
            use_activation_checkpointing(module)
        if settings.compile:
            module.compile()
        for tensor in module.state_dict().values():
            world.broadcast_(tensor)
        groups = trainable(parameter_groups)
        self._world = world
        self._accumulation = accumulation
        self._precision = precision
        self._statistics = statistics
        self._settings = optimizer
        self._parameters = by_name(groups)
        self._optimizer = build_optimizer(groups, optimizer, fused=world.device.type == "cuda")
        self._set_num_updates(0)
        followed = {**self._parameters, **dict(module.named_buffers())}
        self._average = None if settings.ema is None else WeightAverage(followed, decay=settings.ema)
        self._staging = Staging()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.module.train()
        if self._statistics is not None:
            self._statistics.before_micro()
        outputs = self._run(*args, **kwargs)
        if self._statistics is not None:
            self._statistics.after_micro()
        return outputs

    @torch.no_grad()
    def predict(self, *args: Any, **kwargs: Any) -> Any:
        self.module.eval()
        with self._average.in_place() if self._average is not None else nullcontext():
            return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self._world.device.type, dtype=torch.bfloat16, enabled=self._precision == "bf16"):
            outputs = self.module(*args, **kwargs)
        return in_fp32(outputs)

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self._accumulation).backward()

    def step(self, *, learning_rate: float) -> torch.Tensor:
        self._average_gradients()
        norm = nn.utils.clip_grad_norm_(list(self._parameters.values()), self._settings.clip or float("inf"))
        set_learning_rates(self._optimizer, learning_rate)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._num_updates += 1
        if self._statistics is not None:
            self._statistics.commit(self._world.mean_)
        if self._average is not None:
            self._average.update()
        return norm

    def _average_gradients(self) -> None:
        gradients = []
        for parameter in self._parameters.values():
            if parameter.grad is None:  # no loss reached it on this rank, one may have on another
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        if self._world.size > 1:
            mean = self._world.mean_(torch.cat([gradient.reshape(-1) for gradient in gradients]))
            parts = mean.split([gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def snapshot(self) -> Writer:
        rank, size = self._world.rank, self._world.size
        tensors = self._tensors()
        counts = Counts(self._num_updates, 0 if self._average is None else self._average.num_updates)
        held = self._staging.hold((name, tensors[name]) for name in part_of(tensors, rank=rank, size=size))
        return lambda folder: write_part(folder, held, counts=counts, rank=rank, size=size)

    def load(self, folder: Path) -> None:
        reader = StateReader(folder)
        tensors = self._tensors()
        reader.check({name: tensor.shape for name, tensor in tensors.items()})
        for name, tensor in tensors.items():
            tensor.detach().copy_(reader.read(name))
        self._set_num_updates(reader.counts.num_updates)
        if self._average is not None:
            self._average.num_updates = reader.counts.num_average_updates

    def _set_num_updates(self, number: int) -> None:
        self._num_updates = number
        tensors = self._parameters.values()
        set_num_updates(self._optimizer, self._settings, tensors=tensors, num_updates=number)

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {f"weight/{name}": p for name, p in self.module.named_parameters()}
        tensors |= {f"buffer/{name}": buffer for name, buffer in self.module.named_buffers()}
        for name, parameter in self._parameters.items():
            tensors |= {f"{kept}/{name}": self._optimizer.state[parameter][kept] for kept in quantities(self._settings)}
        if self._average is not None:
            tensors |= {f"average/{name}": tensor for name, tensor in self._average.average.items()}
        return tensors

    def weights(self) -> dict[str, torch.Tensor]:
        with self._average.in_place() if self._average is not None else nullcontext():
            return {name: in_fp32(tensor.detach()).cpu().clone() for name, tensor in self.module.state_dict().items()}
