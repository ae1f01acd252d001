"""What speaks for a boundary at each place, over four octaves, and how much each says; loads numba.

Level 0 has a cell every 2 px, each level above half as many a side. Lengths are in cells of the level.
"""

from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt

from dpkd.priors.catalogue.edge_kernels import coherent, gradients, line_strength, strengths, tensor

Image = npt.NDArray[np.float32]
Cues = dict[str, Image]

CHROMA = np.float32(3)
"""Weight of the colour channels a and b against lightness."""
FLOOR = np.float32(0.5)
"""Added to a cue before the logarithm: less is no more than noise."""
LINE_WEIGHT_K = np.exp(-0.5 * (np.arange(4) * 2 / 4) ** 2).astype(np.float32)
"""Of every second cell along a line, up to 6 to either side: a Gaussian of 4."""

BIAS = -2.151
WEIGHTS: tuple[dict[str, float], ...] = (
    {"step": 0.335, "light": 0.268, "line": 0.708, "mean": 0.803},
    {"cross": 0.346, "texture": 1.657, "around": -1.921},
    {"line": 0.3},
    {"cross": 0.212, "around": -1.485, "aligned": 1.368},
)
"""Of each level's cues: `tools/fit_edge.py`."""


def boundary_odds(lab_HWC: Image) -> Image:
    """Logarithm of the odds that a person draws a boundary, HW with a cell every 2 px of a Lab image.

    `BIAS` plus, for each cue c of each level, its weight times ln(c + `FLOOR`).
    """
    odds_HW: Image | None = None
    for cues, weights in zip(reversed(levels(lab_HWC)), reversed(WEIGHTS), strict=True):
        said = np.float32(0)
        for name, weight in weights.items():
            said = said + np.float32(weight) * np.log(cues[name] + FLOOR)
        odds_HW = np.asarray(said, np.float32) if odds_HW is None else said + enlarged(odds_HW, said.shape)
    assert odds_HW is not None
    return odds_HW + np.float32(BIAS)


def levels(lab_HWC: Image) -> list[Cues]:
    """The cues of each level from the finest up.

    Of the planes (L, 3a, 3b), after a Gaussian of one cell (0.8 at level 0), with their structure tensor J:
    `step` and `cross`, the roots of J's larger and smaller eigenvalue; `light`, the gradient of L alone; `mean`, the
    root mean square of the gradient over a Gaussian of 1; `line`, the gradient along a line (`line_strength`), whose
    direction is J's over a Gaussian of 2. `texture` is the gradient of the contrast within cells of level 0, over a
    Gaussian of 1.5. `around` and `aligned` are means of level 0's `step` and of its coherent energy over a wide
    Gaussian: much of the same around speaks against a boundary (surround suppression, Grigorescu et al. 2003), unless
    it is aligned.
    """
    planes, contrast_HW = _cells(lab_HWC)
    finest, step_HW, aligned_HW = _finest(planes)
    planes = [halved(plane_HW) for plane_HW in planes]
    contrast_HW, around_HW = halved(contrast_HW), halved(step_HW)
    gradient_HWC, tensor_3HW = _smoothed(planes, 1.0)
    second = {"cross": strengths(tensor_3HW)[1], "texture": _slope(contrast_HW, 1.5), "around": _blurred(around_HW, 4)}
    planes = [halved(plane_HW) for plane_HW in planes]
    gradient_HWC, tensor_3HW = _smoothed(planes, 1.0)
    third = {"line": _line(gradient_HWC, _spread(tensor_3HW, 2))}
    planes = [halved(plane_HW) for plane_HW in planes]
    around_HW, aligned_HW = halved(halved(around_HW)), halved(halved(halved(aligned_HW)))
    fourth = {
        "cross": strengths(_smoothed(planes, 1.0)[1])[1],
        "around": _blurred(around_HW, 4),
        "aligned": _blurred(aligned_HW, 2),
    }
    return [finest, second, third, fourth]


def enlarged(map_HW: Image, size: tuple[int, ...], *, cubic: bool = False) -> Image:
    """The map interpolated on a grid of height x width."""
    interpolation = cv2.INTER_CUBIC if cubic else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(map_HW, size[::-1], interpolation=interpolation), np.float32)


def halved(image: Image) -> Image:
    """Means over 2 x 2 cells, HW or HWC; an odd side is rounded."""
    height, width = image.shape[:2]
    size = (max(1, round(width / 2)), max(1, round(height / 2)))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.float32)


def _cells(lab_HWC: Image) -> tuple[list[Image], Image]:
    """The planes L, 3a, 3b of level 0, and the root of the deviation of L within each cell."""
    cell_HWC = halved(lab_HWC)
    light_HW = np.ascontiguousarray(lab_HWC[:, :, 0])
    variance_HW = halved(light_HW * light_HW) - np.square(cell_HWC[:, :, 0])
    contrast_HW = np.sqrt(np.sqrt(np.maximum(variance_HW, 0)) + np.float32(0.25))
    return [cell_HWC[:, :, 0].copy(), cell_HWC[:, :, 1] * CHROMA, cell_HWC[:, :, 2] * CHROMA], contrast_HW


def _finest(planes: Sequence[Image]) -> tuple[Cues, Image, Image]:
    """The cues of level 0, its strength, and its energy that has a direction."""
    gradient_HWC, tensor_3HW = _smoothed(planes, 0.8)
    step_HW, spread_3HW = strengths(tensor_3HW)[0], _spread(tensor_3HW, 2)
    cues = {
        "step": step_HW,
        "light": cv2.magnitude(gradient_HWC[:, :, 0].copy(), gradient_HWC[:, :, 1].copy()),
        "line": _line(gradient_HWC, spread_3HW),
        "mean": np.sqrt(_blurred(tensor_3HW[0] + tensor_3HW[1], 1)),
    }
    return cues, step_HW, coherent(spread_3HW)


def _smoothed(planes: Sequence[Image], scale: float) -> tuple[Image, Image]:
    """Gradients of the planes at a scale, times the scale (γ-normalised, Lindeberg 1998), and their tensor."""
    gradient_HWC = gradients(np.stack([_blurred(plane_HW, scale) for plane_HW in planes]), scale=scale)
    return gradient_HWC, tensor(gradient_HWC)


def _slope(map_HW: Image, scale: float) -> Image:
    """Length of the γ-normalised gradient."""
    gradient_HWC = gradients(_blurred(map_HW, scale)[None], scale=scale)
    return cv2.magnitude(gradient_HWC[:, :, 0].copy(), gradient_HWC[:, :, 1].copy())


def _line(gradient_HWC: Image, spread_3HW: Image) -> Image:
    return line_strength(gradient_HWC, spread_3HW, weight_K=LINE_WEIGHT_K, step=2.0)


def _spread(tensor_3HW: Image, scale: float) -> Image:
    return np.stack([_blurred(part_HW, scale) for part_HW in tensor_3HW])


def _blurred(map_HW: Image, scale: float) -> Image:
    return np.asarray(cv2.GaussianBlur(map_HW, (0, 0), scale), np.float32)
