"""Counts parameters and operations of a network."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dpkd.models.network import Network


def count_parameters(network: Network) -> int:
    """Number of parameters of the timm model, which is exported; heads for training do not count."""
    return sum(parameter.numel() for parameter in network.backbone.timm.parameters())


def count_flops(network: Network) -> int:
    """Floating-point operations of the forward pass of one image, 2 for a multiply-add, with all heads.

    Counts matrix products, convolutions and attention in one run; a training step needs about three times as many.
    """
    device = next(network.parameters()).device
    size = network.spec.image_size
    was_training = network.training
    network.eval()
    # plain attention: older versions of torch do not count the fused kernels of the CPU
    # with gradients: otherwise the counter fails if a module's input is a parameter, such as a class token
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, size, size, device=device), torch.ones(1, 1, size, size, device=device))
    network.train(was_training)
    return int(counter.get_total_flops())
