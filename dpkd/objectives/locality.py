"""Distillation of layers, of a convolutional teacher into a transformer. Axes: B sample, D features, H W grid."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from dpkd.objectives.base import Context, Distillation, Head, Needs
from dpkd.objectives.features import teacher_head
from dpkd.objectives.patches import resample_features

if TYPE_CHECKING:
    from torch import Tensor

Layer = Annotated[int, Field(ge=0)]
"""Index among timm's intermediate outputs: the blocks of a ViT; the stages of most others, the stem often the first."""


class LocalityGuidance(Distillation):
    """`Σ_l mean (A_l F_student,l - F_teacher,l)²`, with linear heads A_l, on the larger of both grids (Li et al. 2022).

    The mean over elements is that of the authors' code.
    """

    kind: Literal["locality"] = "locality"
    weight: float = Field(2.5, ge=0)
    layers: dict[Layer, Layer] = Field(min_length=1)
    """For each guided layer of the student, the layer of the teacher that it follows."""

    def needs(self) -> Needs:
        heads = {
            teacher_head(self.teacher, f"layer-{own}-{other}"): Head(f"layer-{own}", f"teacher.layer-{other}")
            for own, other in self.layers.items()
        }
        return Needs(heads=heads, teacher=tuple(f"layer-{other}" for other in self.layers.values()))

    def loss(self, context: Context) -> dict[str, Tensor]:
        losses = {}
        for own, other in self.layers.items():
            student_BDHW = context.student(teacher_head(self.teacher, f"layer-{own}-{other}"))
            teacher_BDHW = context.teacher(f"layer-{other}")
            (rows, columns), (other_rows, other_columns) = student_BDHW.shape[2:], teacher_BDHW.shape[2:]
            grid = (max(rows, other_rows), max(columns, other_columns))
            gap_BDHW = resample_features(student_BDHW, grid) - resample_features(teacher_BDHW, grid)
            losses[f"layer-{own}"] = self.weight * gap_BDHW.square().mean()
        return losses
