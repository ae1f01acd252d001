"""Where a network looks, as a map.

Axes: B image, N tokens (prefix tokens first), D features, A attention heads, H W patch grid.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dpkd.models.network import Network


@torch.no_grad()
def attention_map(network: Network, image_BCHW: Tensor) -> Tensor:
    """Which patches a network's embedding rests on, B1HW float32, each image scaled to a largest value of 1.

    For a ViT the last block's attention, mean over heads: from the class token (Caron et al. 2021) where the model has
    one, else what each patch receives from all. For any other model the energy of its features, Σ_D f²
    (Zagoruyko & Komodakis 2017). The network's mode (training or evaluation) is left as it is.
    """
    attention = _last_attention(network)
    if attention is None:
        patch_BDHW = network.backbone.patches(network.backbone.features(image_BCHW))
        return _to_unit(patch_BDHW.float().square().sum(1, keepdim=True))
    seen: list[Tensor] = []
    handle = attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        network.backbone.features(image_BCHW)
    finally:
        handle.remove()
    weight_BANN = _attention_weights(attention, seen[0])
    num_prefix = network.backbone.num_prefix_tokens
    rows_BAN = weight_BANN[:, :, 0] if num_prefix else weight_BANN.mean(2)
    return _to_unit(rows_BAN.mean(1)[:, num_prefix:].unflatten(1, network.grid).unsqueeze(1))


def _last_attention(network: Network) -> Any:
    """The attention layer of a ViT's last block, none where the model has no such thing."""
    blocks = getattr(network.backbone.timm, "blocks", None)
    attention = getattr(blocks[-1], "attn", None) if isinstance(blocks, (nn.Sequential, nn.ModuleList)) else None
    plain = all(hasattr(attention, name) for name in ("qkv", "q_norm", "k_norm", "num_heads", "scale"))
    return attention if plain else None


def _attention_weights(attention: Any, token_BND: Tensor) -> Tensor:
    """Softmax of the scaled products of queries and keys, BANN; timm's fused attention does not give it away."""
    query, key, _ = attention.qkv(token_BND).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    query, key = attention.q_norm(query), attention.k_norm(key)
    product: Tensor = (query * attention.scale) @ key.transpose(-2, -1)
    return product.float().softmax(-1)


def _to_unit(map_B1HW: Tensor) -> Tensor:
    return map_B1HW / map_B1HW.amax((2, 3), keepdim=True).clamp(min=1e-12)
