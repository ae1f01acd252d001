"""Parameter groups for the optimizer: weight decay, and a learning rate that decreases towards the input."""

import re

from timm.models import group_parameters
from torch import nn

from dpkd.engine.optimizer import ParameterGroup
from dpkd.errors import UserError
from dpkd.models.network import Network


def parameter_groups(module: nn.Module, *, weight_decay: float, layer_decay: float = 1.0) -> list[ParameterGroup]:
    """Groups every trainable parameter of a module once; raises `UserError` if it has none.

    Vectors, scalars (biases, norms) and the parameters of timm's `no_weight_decay` have no weight decay. With
    `layer_decay` below 1, the backbone's parameters at depth `d` of `D` (timm's layer groups, the classifier deepest)
    have `lr_scale = layer_decay ** (D - d)`, as in BEiT (Bao et al. 2021); heads outside the backbone have 1.
    """
    without_decay: set[str] = set()
    scale_of: dict[str, float] = {}
    for name, child in module.named_modules():
        if isinstance(child, Network):
            model, prefix = child.backbone.timm, f"{name}.backbone.timm.".removeprefix(".")
            if hasattr(model, "no_weight_decay"):  # position embeddings and class tokens
                without_decay |= {prefix + parameter for parameter in model.no_weight_decay()}
            if layer_decay != 1.0:
                if hasattr(model, "group_matcher"):
                    matcher = model.group_matcher(coarse=False)
                else:  # timm defines no layer groups: one group for each top child
                    matcher = {f"group{i}": f"^{re.escape(part)}" for i, (part, _) in enumerate(model.named_children())}
                depth_of: dict[str, int] = group_parameters(model, matcher, reverse=True)
                deepest = max(depth_of.values(), default=0)
                scale_of |= {prefix + key: layer_decay ** (deepest - depth) for key, depth in depth_of.items()}
    groups: dict[tuple[float, float], ParameterGroup] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            decay = 0.0 if parameter.ndim <= 1 or name in without_decay else weight_decay
            scale = scale_of.get(name, 1.0)
            empty = ParameterGroup(params=[], names=[], weight_decay=decay, lr_scale=scale)
            group = groups.setdefault((scale, decay), empty)
            group["params"].append(parameter)
            group["names"].append(name)
    if not groups:
        raise UserError("the network has no trainable parameter: unfreeze a part of it")
    return list(groups.values())
