"""Prediction of the turn of an image, from all images, labelled or not (RotNet, Gidaris et al. 2018).

Axes: B sample, C channel, H W height and width, R rows of the turned view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from dpkd.objectives.base import Context, Derived, DerivedView, Draw, Head, Needs, Objective

if TYPE_CHECKING:
    from torch import Tensor

HEAD = "rotation"


@dataclass(frozen=True)
class Turned(DerivedView):
    """A share of the images, each turned by 0, 90, 180 or 270 degrees; `turn` is int64 R, in quarters."""

    share: float

    def derive(self, inputs: Sequence[Tensor], draw: Draw) -> Derived:
        from dpkd.objectives.draws import TURNS, uniform

        turn_R = (4 * uniform(draw.first(self.share), step=draw.step, seed=draw.seed, stream=TURNS)).long()
        return Derived([turned(part[: len(turn_R)], turn_R) for part in inputs], {"turn": turn_R})


class Rotation(Objective):
    """Cross-entropy of the turn of an image, from its embedding (in few-shot learning: Gidaris et al. 2019; S2M2)."""

    kind: Literal["rotation"] = "rotation"
    share: float = Field(1.0, gt=0, le=1)
    """Share of the images of a micro-batch that are turned; each is one more image in the forward pass."""

    def needs(self) -> Needs:
        return Needs(heads={HEAD: Head("embedding", 4)}, derived=(Turned(self.share),))

    def loss(self, context: Context) -> Tensor:
        import torch.nn.functional as F

        view = Turned(self.share).name
        return self.weight * F.cross_entropy(context.student(HEAD, view=view), context.facts[view]["turn"])


def turned(image_BCHW: Tensor, turn_B: Tensor) -> Tensor:
    """The square images, each turned by its number of quarters (int64 B) against the clock, pixel by pixel."""
    import torch

    assert image_BCHW.shape[2] == image_BCHW.shape[3], "a turn keeps the shape of squares alone"
    result_BCHW = image_BCHW
    for quarters in (1, 2, 3):
        chosen_B111 = (turn_B == quarters)[:, None, None, None]
        result_BCHW = torch.where(chosen_B111, torch.rot90(image_BCHW, quarters, (2, 3)), result_BCHW)
    return result_BCHW
