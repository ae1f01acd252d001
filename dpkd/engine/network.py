"""What every engine does to a network: device, first weights, precision, activation checkpointing; frozen networks."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dpkd.engine.settings import EngineSettings
from dpkd.engine.world import World
from dpkd.errors import UserError


class InPrecision(nn.Module):
    """Runs a network under autocast to bf16 where `precision` asks for it; floating-point outputs come as fp32."""

    def __init__(self, network: nn.Module, *, device: torch.device, precision: str) -> None:
        super().__init__()
        self.network = network
        self._device_type, self._lower = device.type, precision == "bf16"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's outputs."""
        with torch.autocast(self._device_type, dtype=torch.bfloat16, enabled=self._lower):
            outputs = self.network(*args, **kwargs)
        return in_fp32(outputs)


def in_fp32(outputs: Any) -> Any:
    """`outputs` (a tensor, or dicts, lists and tuples of them) with floating-point tensors as fp32, for the losses."""
    if isinstance(outputs, torch.Tensor):
        return outputs.float() if outputs.is_floating_point() else outputs
    if isinstance(outputs, dict):
        return {name: in_fp32(output) for name, output in outputs.items()}
    if isinstance(outputs, (list, tuple)):
        return type(outputs)(in_fp32(output) for output in outputs)
    return outputs


def prepare(module: nn.Module, *, settings: EngineSettings, world: World) -> None:
    """Puts a network on this rank's device with the weights of rank 0, and turns on activation checkpointing.

    Raises `UserError` where the settings ask for activation checkpointing and the model cannot do it.
    """
    module.to(world.device)
    if settings.activation_checkpointing:  # recomputes activations in the backward pass
        parts: list[Any] = [part for part in module.modules() if hasattr(part, "set_grad_checkpointing")]
        reason = None if parts else "this model has no such switch"
        try:
            for part in parts[:1]:
                part.set_grad_checkpointing()
        except AssertionError as error:  # how timm says that a model cannot
            reason = str(error)
        if reason is not None:
            raise UserError(f"engine.activation_checkpointing=true: {reason}; set it to false for this model")
    for tensor in module.state_dict().values():
        world.broadcast_(tensor)


@dataclass(frozen=True)
class Frozen:
    """A network that only predicts; its weights may be sharded over the ranks, so all ranks predict together."""

    spec: Any
    """What the network was built from."""
    runner: nn.Module
    """Runs it in evaluation mode, in its precision, with fp32 outputs."""

    @torch.no_grad()
    def predict(self, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """The network's outputs, without gradients; every rank calls it equally often."""
        outputs: dict[str, torch.Tensor] = self.runner(*inputs)
        return outputs
