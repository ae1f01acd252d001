"""Optimizers over parameter groups, as every engine uses them."""

from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import nn

from dpkd.errors import UserError
from dpkd.train.settings import OptimizerSettings


class ParameterGroup(TypedDict):
    """Parameters that share a weight decay and a factor on the learning rate."""

    params: list[nn.Parameter]
    names: list[str]
    weight_decay: float
    lr_scale: float


def trainable(groups: Sequence[Any]) -> list[ParameterGroup]:
    """The groups without frozen parameters; a group that this empties is left out."""
    kept = []
    for group in groups:
        pairs = [pair for pair in zip(group["names"], group["params"], strict=True) if pair[1].requires_grad]
        if pairs:
            names, parameters = map(list, zip(*pairs, strict=True))
            decay, scale = group["weight_decay"], group["lr_scale"]
            kept.append(ParameterGroup(params=parameters, names=names, weight_decay=decay, lr_scale=scale))
    if not kept:
        raise UserError("the network has no trainable parameter: unfreeze a part of it, or do not train it")
    return kept


def by_name(groups: Sequence[ParameterGroup]) -> dict[str, nn.Parameter]:
    """Every parameter of the groups under its name."""
    return {name: p for group in groups for name, p in zip(group["names"], group["params"], strict=True)}


def build_optimizer(
    groups: Sequence[ParameterGroup], settings: OptimizerSettings, *, fused: bool
) -> torch.optim.Optimizer:
    """The torch optimizer over the groups; `set_learning_rates` gives the rates at every step."""
    options: list[dict[str, Any]] = [
        {"params": group["params"], "weight_decay": group["weight_decay"], "lr_scale": group["lr_scale"]}
        for group in groups
    ]
    if settings.kind == "adamw":
        return torch.optim.AdamW(options, lr=settings.learning_rate, betas=settings.betas, fused=fused)
    return torch.optim.SGD(options, lr=settings.learning_rate, momentum=settings.momentum, fused=fused)


def set_learning_rates(optimizer: Any, learning_rate: float) -> None:
    """Gives each group `learning_rate` times its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_scale"]


def quantities(settings: OptimizerSettings) -> tuple[str, ...]:
    """The tensors that the optimizer keeps for a parameter, by torch's names."""
    if settings.kind == "adamw":
        return ("exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if settings.momentum > 0 else ()


def start_state(optimizer: torch.optim.Optimizer, settings: OptimizerSettings, *, num_updates: int) -> None:
    """Makes the state that torch would make at the first update where there is none, and sets the count of updates."""
    fused = bool(optimizer.defaults["fused"])
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            for quantity in quantities(settings):
                if quantity not in state:  # zero momentum gives torch's first update exactly
                    state[quantity] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            if settings.kind == "adamw":  # a tensor of its own: a shared one would count once for each parameter
                state["step"] = torch.tensor(float(num_updates), device=parameter.device if fused else "cpu")
