"""The size of a network, counted."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dpkd.models.network import Network


def count_parameters(network: Network) -> int:
    """Parameters of the timm model, which is what leaves; heads that only training needs do not count."""
    return sum(parameter.numel() for parameter in network.backbone.timm.parameters())


def count_flops(network: Network) -> int:
    """Floating-point operations of one image's forward pass, 2 a multiply-add, all heads included.

    Counted by running it (matrix products, convolutions and attention); a training step takes about three times that.
    """
    device = next(network.parameters()).device
    size = network.spec.image_size
    was_training = network.training
    network.eval()
    # plain attention: older versions of torch do not count the fused kernels of the CPU
    # with gradients: without them the counter fails at a module that takes a parameter, such as a class token
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, size, size, device=device), torch.ones(1, 1, size, size, device=device))
    network.train(was_training)
    return int(counter.get_total_flops())
