"""Distillation of the relations between the patches of an image. Axes: B sample, D features, H W grid, N patches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dpkd.objectives.base import Context, Distillation, Needs, Weight
from dpkd.objectives.patches import patch_weight, resample_features

if TYPE_CHECKING:
    from torch import Tensor


class PatchRelations(Distillation):
    """`1 - CKA` of the kernels of an image's patches (PaKA, Yeo et al. 2025), patch i weighted by `1 + saliency · S_i`.

    It needs no head: kernels of any two widths compare.
    """

    kind: Literal["patch_relations"] = "patch_relations"
    saliency: Weight = 0.0
    map_free: ClassVar[Mapping[str, Any]] = {"saliency": 0.0}

    def needs(self) -> Needs:
        maps = ("saliency",) if self.saliency else ()
        return Needs(student=("patch",), teacher=("patch",), maps=maps, amounts=maps)

    def loss(self, context: Context) -> Tensor:
        weight_B1HW = patch_weight(context, {"saliency": self.saliency})
        return self.weight * kernel_misalignment(context.student("patch"), context.teacher("patch"), weight_B1HW)


def kernel_misalignment(student_BDHW: Tensor, teacher_BDHW: Tensor, weight_B1HW: Tensor | None = None) -> Tensor:
    """`1 - <K_s, K_t> / (‖K_s‖ ‖K_t‖)` with the centred linear kernels K of each image's patches, mean over images.

    Yeo et al. 2025 (PaKA); the linear CKA of Kornblith et al. 2019. The teacher's features are resampled to the
    student's grid, and the weight (of any size) is averaged to it. With the shares p_i of the weight,
    `K_ij = √p_i (x_i - Σ p x)·(x_j - Σ p x) √p_j`; equal shares give the definition of the papers.
    """
    import torch.nn.functional as F

    from dpkd.models.resample import area_resample

    grid = (student_BDHW.shape[2], student_BDHW.shape[3])
    if weight_B1HW is None:
        weight_B1HW = student_BDHW.new_ones(1, 1, 1, 1)
    weight_BN1 = area_resample(weight_B1HW, grid).flatten(2).mT
    share_BN1 = weight_BN1 / weight_BN1.sum(1, keepdim=True)
    kernels = []
    for patch_BDHW in (student_BDHW, resample_features(teacher_BDHW, grid)):
        patch_BND = patch_BDHW.float().flatten(2).mT
        centred_BND = share_BN1.sqrt() * (patch_BND - (share_BN1 * patch_BND).sum(1, keepdim=True))
        kernels.append((centred_BND @ centred_BND.mT).flatten(1))
    return (1 - F.cosine_similarity(kernels[0], kernels[1], dim=1)).mean()
