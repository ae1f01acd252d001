"""Parameter groups for the optimizer: weight decay, and a learning rate that shrinks towards the input."""

import re
from collections.abc import Iterator
from typing import Any, TypedDict

from timm.models import group_parameters
from torch import nn

from dpkd.models.network import Network


class ParameterGroup(TypedDict):
    """Parameters that share their hyperparameters; `names` stand in the same order as `params`."""

    params: list[nn.Parameter]
    names: list[str]
    weight_decay: float
    lr_scale: float


def parameter_groups(module: nn.Module, *, weight_decay: float, layer_decay: float = 1.0) -> list[ParameterGroup]:
    """Groups every trainable parameter of a module once.

    Vectors and scalars (biases, norms) and what the timm model names in `no_weight_decay` carry no weight decay. With
    `layer_decay` below 1 the backbone's parameters at depth `d` of `D` (timm's own layer groups, the classifier
    deepest) get `lr_scale = layer_decay ** (D - d)`, as BEiT does (Bao et al. 2021); heads outside it get 1.
    """
    scale_of = _layer_scales(module, layer_decay=layer_decay)
    plain = _without_decay(module)
    groups: dict[tuple[float, float], ParameterGroup] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = 0.0 if parameter.ndim <= 1 or name in plain else weight_decay
        scale = scale_of.get(name, 1.0)
        empty: ParameterGroup = {"params": [], "names": [], "weight_decay": decay, "lr_scale": scale}
        group = groups.setdefault((scale, decay), empty)
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def _layer_scales(module: nn.Module, *, layer_decay: float) -> dict[str, float]:
    """The learning rate scale of each parameter in a backbone, by its full name."""
    scales: dict[str, float] = {}
    if layer_decay == 1.0:
        return scales
    for prefix, model in _timm_models(module):
        depth_of: dict[str, int] = group_parameters(model, _matcher(model), reverse=True)
        deepest = max(depth_of.values(), default=0)
        scales |= {prefix + name: layer_decay ** (deepest - depth) for name, depth in depth_of.items()}
    return scales


def _matcher(model: nn.Module) -> Any:
    """How timm cuts this model into layers; a model that does not say is cut at its top children."""
    matcher = getattr(model, "group_matcher", None)
    if matcher is not None:
        return matcher(coarse=False)
    return {f"group{position}": f"^{re.escape(name)}" for position, (name, _) in enumerate(model.named_children())}


def _without_decay(module: nn.Module) -> set[str]:
    """Full names of the parameters that a timm model wants free of weight decay (positions, class tokens)."""
    names: set[str] = set()
    for prefix, model in _timm_models(module):
        if hasattr(model, "no_weight_decay"):
            listed = set(model.no_weight_decay())
            names |= {prefix + name for name, _ in model.named_parameters() if name in listed}
    return names


def _timm_models(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The timm model of every network in a module, with the prefix of its parameters' names."""
    for name, child in module.named_modules():
        if isinstance(child, Network):
            yield (f"{name}." if name else "") + "backbone.timm.", child.backbone.timm
