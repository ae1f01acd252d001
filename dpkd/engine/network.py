"""Networks prepared for any engine: device, first weights, precision, activation checkpointing; frozen networks."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dpkd.engine.settings import EngineSettings
from dpkd.engine.world import World
from dpkd.errors import UserError


class InPrecision(nn.Module):
    """Runs a network under autocast to bf16 if `precision` is bf16; returns floating-point outputs as fp32.

    On a GPU a convolutional network gets its images channels-last, the layout of tensor cores, which its layers keep.
    """

    def __init__(self, network: nn.Module, *, device: torch.device, precision: str) -> None:
        super().__init__()
        self.network = network
        self._device_type, self._autocast = device.type, precision == "bf16"
        self._channels_last = device.type == "cuda" and is_convolutional(network)

    def forward(self, image_BCHW: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The network's outputs."""
        if self._channels_last:
            image_BCHW = image_BCHW.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self._device_type, dtype=torch.bfloat16, enabled=self._autocast):
            outputs = self.network(image_BCHW, *args, **kwargs)
        return in_fp32(outputs)


def is_convolutional(network: nn.Module) -> bool:
    """Whether a network has more spatial convolutions than the one that embeds the patches of a transformer."""
    return sum(max(part.kernel_size) > 1 for part in network.modules() if isinstance(part, nn.Conv2d)) > 1


def cast_layers(network: nn.Module) -> None:
    """Casts the weights that autocast would cast to bf16 at every call, for the same outputs from half the memory."""
    for layer in network.modules():
        if type(layer) in (nn.Linear, nn.Conv2d):  # subclasses may compute with their weights
            layer.to(torch.bfloat16)


def in_fp32(outputs: Any) -> Any:
    """Converts a floating-point tensor, or those in a dict, to fp32."""
    if isinstance(outputs, dict):
        return {name: in_fp32(output) for name, output in outputs.items()}
    return outputs.float() if outputs.is_floating_point() else outputs


def prepare(module: nn.Module, *, settings: EngineSettings, world: World) -> None:
    """Moves a network to this rank's device, copies the weights of rank 0, and sets activation checkpointing.

    Raises `UserError` if the settings turn on activation checkpointing and the model does not support it.
    """
    module.to(world.device)
    if settings.activation_checkpointing:  # recomputes activations in the backward pass
        switches: list[Any] = [
            part.set_grad_checkpointing for part in module.modules() if hasattr(part, "set_grad_checkpointing")
        ]
        try:
            assert switches, "this model does not support it"
            switches[0]()
        except AssertionError as error:  # timm raises it for a model without support
            raise UserError(f"engine.activation_checkpointing=true: {error}; set it to false for this model") from error
    for tensor in module.state_dict().values() if world.size > 1 else ():
        dist.broadcast(tensor, src=0)


@dataclass(frozen=True)
class Frozen:
    """A network that only predicts; its weights may be sharded over the ranks, so all ranks predict together."""

    spec: Any
    """The specification that the network was built from."""
    runner: nn.Module
    """Runs the network in evaluation mode, in its precision, with fp32 outputs."""

    @torch.no_grad()
    def predict(self, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """The network's outputs, without gradients; all ranks call it the same number of times."""
        outputs: dict[str, torch.Tensor] = self.runner(*inputs)
        return outputs
