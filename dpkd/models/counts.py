"""Counts parameters and operations of a network."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dpkd.models.network import Network
from dpkd.models.settings import NetworkSpec


def count_parameters(network: Network) -> int:
    """Number of parameters of the timm model, which is exported; heads for training do not count."""
    return sum(parameter.numel() for parameter in network.backbone.timm.parameters())


def count_flops(spec: NetworkSpec, *, image_size: int | None = None) -> int:
    """Floating-point operations of the forward pass of one image, 2 for a multiply-add, with all heads.

    Counts matrix products, convolutions and attention of a network without weights, so nothing is computed; a training
    step needs about three times as many. `image_size` is the side of the image, by default that of the spec.
    """
    size = image_size or spec.image_size
    model = spec.model.model_copy(update={"pretrained": False})
    with torch.device("meta"):
        network = Network(spec.model_copy(update={"model": model})).eval()
        inputs = torch.zeros(1, 3, size, size), torch.ones(1, 1, size, size)
    # plain attention: older versions of torch do not count the fused kernels of the CPU
    # with gradients: otherwise the counter fails if a module's input is a parameter, such as a class token
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(*inputs)
    return int(counter.get_total_flops())
