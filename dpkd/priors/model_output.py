"""What comes out of a model: which of its outputs counts, and its values in [0, 1].

Axes: B image, C channel, H W height and width.
"""

from collections.abc import Callable, Mapping
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from dpkd.errors import UserError

Array = npt.NDArray[np.float32]
Run = Callable[[Array], Array]
"""A loaded model: images BCHW, float32 and normalised, to its output."""
Scale = Literal["unit", "sigmoid", "softmax", "largest", "minmax"]
Output = TypeVar("Output")

SLACK = 0.1
"""How far beyond 0 and 1 values may be that are said to lie between: resampling inside a model overshoots."""


def chosen(outputs: Mapping[str, Output], output: str | int | None) -> Output:
    """The output of that name or position, or the only one; raises `UserError` that names those there are."""
    names = list(outputs)
    known = f"it has {len(names)}: {', '.join(names)}"
    if output is None:
        if len(names) != 1:
            raise UserError(f"model.output says which output to take; {known}")
        return outputs[names[0]]
    if isinstance(output, int):
        if not -len(names) <= output < len(names):
            raise UserError(f"model.output={output} is no position among its outputs; {known}")
        return outputs[names[output]]
    if output not in outputs:
        raise UserError(f"model.output={output!r} is none of its outputs; {known}")
    return outputs[output]


def scaled(values_BCHW: Array, scale: Scale) -> Array:
    """The values in [0, 1], each channel of each image by itself; NaN stays NaN.

    `unit` clips, `sigmoid` and `softmax` (over channels) are the functions, `largest` divides by the largest value,
    `minmax` takes the smallest to 0 and the largest to 1. Raises `UserError` where `unit` would clip much.
    """
    if scale == "sigmoid":
        return np.asarray(np.float32(1) / (1 + np.exp(-np.clip(values_BCHW, -60, 60))), np.float32)
    if scale == "softmax":
        share_BCHW = np.exp(values_BCHW - values_BCHW.max(1, keepdims=True))
        return share_BCHW / share_BCHW.sum(1, keepdims=True)
    if scale == "unit":
        _refuse_wide(values_BCHW)
    if scale == "minmax":
        values_BCHW = values_BCHW - values_BCHW.min((2, 3), keepdims=True)
    if scale in ("minmax", "largest"):
        values_BCHW = values_BCHW / np.maximum(values_BCHW.max((2, 3), keepdims=True), np.float32(1e-12))
    return np.clip(values_BCHW, 0, 1)


def _refuse_wide(values_BCHW: Array) -> None:
    lowest, highest = float(values_BCHW.min()), float(values_BCHW.max())
    if lowest < -SLACK or highest > 1 + SLACK:
        raise UserError(
            f"its values go from {lowest:.3g} to {highest:.3g}, and scale=unit is for those in [0, 1]: "
            "set scale to sigmoid, softmax, largest or minmax"
        )
