"""Attention maps of a network.

Axes: B image, N tokens (prefix tokens first), D features, A attention heads, H W patch grid.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dpkd.models.backbone import Backbone


@torch.no_grad()
def with_attention(backbone: Backbone, predict: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The outputs of `predict` and `attention`, a map of patch importance; `predict` runs the backbone once.

    The map is B1HW float32, scaled to a maximum of 1 in each image. For a ViT, it is the last block's attention, mean
    over heads: from the class token (Caron et al. 2021) if the model has one, else from all tokens. For any other
    model, or if a compiled graph hides the block, it is the energy of the patch features, Σ_D f² (Zagoruyko &
    Komodakis 2017). Hooks read queries and keys in the forward pass, so the weights may be sharded over ranks.
    """
    attention = attention_layer(backbone)
    inputs: list[Tensor] = []
    norms = [] if attention is None else [attention.q_norm, attention.k_norm]
    handles = [norm.register_forward_hook(lambda _module, _inputs, output: inputs.append(output)) for norm in norms]
    try:
        outputs = predict()
    finally:
        for handle in handles:
            handle.remove()
    if attention is None or len(inputs) != len(norms):
        map_B1HW = outputs["patch"].float().square().sum(1, keepdim=True)
    else:
        query_BAND, key_BAND = inputs
        weight_BANN = (query_BAND.float() * attention.scale @ key_BAND.float().transpose(-2, -1)).softmax(-1)
        num_prefix = backbone.num_prefix_tokens
        received_BAN = weight_BANN[:, :, 0] if num_prefix else weight_BANN.mean(2)
        map_B1HW = received_BAN.mean(1)[:, num_prefix:].unflatten(1, backbone.grid).unsqueeze(1)
    return outputs | {"attention": map_B1HW / map_B1HW.amax((2, 3), keepdim=True).clamp(min=1e-12)}


def attention_layer(backbone: Backbone) -> Any:
    """The attention layer of a ViT's last block, read by `with_attention`; None for any other model."""
    blocks = getattr(backbone.timm, "blocks", None)
    attention = getattr(blocks[-1], "attn", None) if isinstance(blocks, (nn.Sequential, nn.ModuleList)) else None
    plain = all(hasattr(attention, name) for name in ("qkv", "q_norm", "k_norm", "num_heads", "scale"))
    return attention if plain else None
