"""Area resampling of maps to a patch grid.

Axes: B sample, C channel, H W height and width, O I output and input cells of one side.
"""

from contextlib import nullcontext

import torch
from torch import Tensor


def area_resample(map_BCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Means of a map over the cells of a `size` grid, with input cells weighted by the shared area; float32.

    Exact for any pair of sizes (adaptive pooling is inexact if they do not divide), and linear in the map.
    """
    rows_OI = _shared_length(map_BCHW.shape[-2], size[0], device=map_BCHW.device)
    columns_OI = _shared_length(map_BCHW.shape[-1], size[1], device=map_BCHW.device)
    device = map_BCHW.device.type
    # autocast would run the products in half precision; the device meta, on which operations are counted, has none
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        return rows_OI @ map_BCHW.float() @ columns_OI.T


def _shared_length(num_in: int, num_out: int, *, device: torch.device) -> Tensor:
    """The share of output cell `o` that input cell `i` covers on one axis; rows sum to 1."""
    edges_out = torch.arange(num_out + 1, device=device, dtype=torch.float32) / num_out
    edges_in = torch.arange(num_in + 1, device=device, dtype=torch.float32) / num_in
    upper_OI = torch.minimum(edges_out[1:, None], edges_in[None, 1:])
    lower_OI = torch.maximum(edges_out[:-1, None], edges_in[None, :-1])
    return (upper_OI - lower_OI).clamp(min=0) * num_out
