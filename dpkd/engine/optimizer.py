"""Optimizers over parameter groups, as every engine uses them."""

from collections.abc import Iterable, Sequence
from typing import Any, TypedDict

import torch
from torch import nn

from dpkd.engine.settings import OptimizerSettings
from dpkd.errors import UserError


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


def set_num_updates(
    optimizer: torch.optim.Optimizer,
    settings: OptimizerSettings,
    *,
    tensors: Iterable[torch.Tensor],
    num_updates: int,
) -> None:
    """Sets the count of updates of each optimized tensor, making its state where there is none."""
    fused = bool(optimizer.defaults["fused"])
    for tensor in tensors:
        state = optimizer.state[tensor]
        for quantity in quantities(settings):
            if quantity not in state:  # zeros give the first update exactly as torch's own lazy start does
                state[quantity] = torch.zeros_like(tensor, memory_format=torch.preserve_format)
        if settings.kind == "adamw":  # each its own: a shared one would count once for every tensor
            state["step"] = torch.tensor(float(num_updates), device=tensor.device if fused else "cpu")
