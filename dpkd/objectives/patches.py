"""Distillation of patch features, weighted by figure and boundaries. Axes: B sample, D features, H W patch grid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dpkd.objectives.base import Context, Distillation, Head, Needs, Weight
from dpkd.objectives.features import feature_distance, teacher_head

if TYPE_CHECKING:
    from torch import Tensor


class PatchDistillation(Distillation):
    """Distance between patch features, patch i weighted by `1 + saliency · S_i + edge · E_i`."""

    kind: Literal["patches"] = "patches"
    saliency: Weight = 1.0
    edge: Weight = 2.0
    map_free: ClassVar[Mapping[str, Any]] = {"saliency": 0.0, "edge": 0.0}

    def needs(self) -> Needs:
        maps = tuple(name for name, weight in (("saliency", self.saliency), ("edge", self.edge)) if weight)
        head = Head("patch", "teacher.patch")
        return Needs(heads={teacher_head(self.teacher, "patch"): head}, teacher=("patch",), maps=maps, amounts=maps)

    def loss(self, context: Context) -> Tensor:
        weight_B1HW = patch_weight(context, {"saliency": self.saliency, "edge": self.edge})
        student_BDHW = context.student(teacher_head(self.teacher, "patch"))
        return self.weight * distil_patches(student_BDHW, context.teacher("patch"), weight_B1HW)


def patch_weight(context: Context, factors: Mapping[str, float]) -> Tensor | None:
    """`1 + Σ factor · map` over the maps of `factors`, unknown maps as 0; B1HW, or None if all factors are 0."""
    weight_B1HW = None
    for name, factor in factors.items():
        if factor:
            weight_B1HW = factor * context.map(name).nan_to_num(0) + (1 if weight_B1HW is None else weight_B1HW)
    return weight_B1HW


def distil_patches(student_BDHW: Tensor, teacher_BDHW: Tensor, weight_B1HW: Tensor | None = None) -> Tensor:
    """`Σ w d / Σ w` over each sample's patches, with d of `feature_distance`, mean over samples; a scalar.

    The student's features are resampled to the teacher's grid, and the weight (of any size; None weights all equally)
    is averaged to it. The division by each sample's sum makes the loss independent of the cut of the batch. Weights for
    figure and boundary: Yang et al. 2022 (FGD), Liu et al. 2024 (BPKD).
    """
    from dpkd.models.resample import area_resample

    grid = (teacher_BDHW.shape[2], teacher_BDHW.shape[3])
    student_BDHW = resample_features(student_BDHW, grid)
    distance_BHW = feature_distance(student_BDHW, teacher_BDHW, dim=1)
    if weight_B1HW is None:
        return distance_BHW.mean()
    weight_BHW = area_resample(weight_B1HW, grid).squeeze(1)
    return ((weight_BHW * distance_BHW).sum((1, 2)) / weight_BHW.sum((1, 2))).mean()


def resample_features(patch_BDHW: Tensor, grid: tuple[int, int]) -> Tensor:
    """Feature maps on another grid: averaged with a triangle filter if smaller, bilinear if larger."""
    import torch.nn.functional as F

    if (patch_BDHW.shape[2], patch_BDHW.shape[3]) == grid:
        return patch_BDHW
    return F.interpolate(patch_BDHW.float(), size=grid, mode="bilinear", align_corners=False, antialias=True)
