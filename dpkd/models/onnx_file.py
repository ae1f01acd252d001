"""Writes a network as ONNX, and compares outputs."""

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn

from dpkd.errors import UserError

ONNX_OPSET = 18
CHECK_BATCHES = (1, 3)
"""Batch sizes at which ONNX is compared; the exported file must accept any size."""


def write_module(
    path: Path,
    module: nn.Module,
    inputs_of: Callable[[int], tuple[Tensor, ...]],
    *,
    names: tuple[Sequence[str], Sequence[str]],
    tolerance: float,
) -> float:
    """Writes a module as ONNX for any batch size; returns its largest relative difference from PyTorch.

    `inputs_of(batch size)` gives its inputs; `names` are those of inputs and outputs, and the module returns a tuple.
    Raises `UserError` above the tolerance.
    """
    batch = torch.export.Dim("batch", min=1)
    with torch.inference_mode(), warnings.catch_warnings():
        # several inputs share this axis
        warnings.filterwarnings("ignore", message=".*The axis name: batch will not be used")
        torch.onnx.export(
            module,
            inputs_of(2),
            path,
            input_names=names[0],
            output_names=names[1],
            dynamic_shapes=[{0: batch} for _ in names[0]],
            opset_version=ONNX_OPSET,
            external_data=False,
            verbose=False,
            dynamo=True,
        )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    difference = 0.0
    for batch_size in CHECK_BATCHES:
        inputs = inputs_of(batch_size)
        outputs = session.run(None, {name: tensor.numpy() for name, tensor in zip(names[0], inputs, strict=True)})
        with torch.inference_mode():
            expected = module(*inputs)
        for output, expected_output in zip(outputs, expected, strict=True):
            difference = max(difference, difference_of(torch.from_numpy(output), expected_output))
    if difference > tolerance:
        raise UserError(
            f"ONNX gives other outputs than PyTorch: they differ by {difference:.2g} of the largest, and "
            f"{tolerance:.2g} is allowed"
        )
    return difference


def difference_of(output: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected value; infinite for different shapes."""
    if output.shape != expected.shape:
        return math.inf
    difference = float((output - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
    return difference if math.isfinite(difference) else math.inf
