"""Distillation of patches: their features, relations and labels, and layers, some weighted by prior maps.

Axes: B sample, D features, K class, H W patch grid, N patches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from dpkd.objectives.base import Context, Distillation, Head, Needs, Weight
from dpkd.objectives.features import feature_distance, teacher_head

if TYPE_CHECKING:
    from torch import Tensor

Layer = Annotated[int, Field(ge=0)]
"""Index among timm's intermediate outputs: the blocks of a ViT; the stages of most others, the stem often the first."""


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


class PatchLabels(Distillation):
    """Cross-entropy of a second head with K + 1 classes on each patch: the teacher's classes, and background.

    SUN (Dong et al. 2022): the teacher's classifier, applied to each of its patches, gives their labels. Here the
    background patches are those where a prior map is lowest. An image with an unknown map has a loss of 0.
    """

    kind: Literal["patch_labels"] = "patch_labels"
    weight: float = Field(0.5, ge=0)
    prior: str | None = "saliency"
    """Prior map that is low on background; with None, background is where the teacher's largest logit is low (SUN)."""
    background: float = Field(0.4, ge=0, lt=1)
    """Share of background patches of each image; SUN takes 10 of 25."""
    top: int = Field(5, ge=1)
    """Number of classes in the label of a patch."""
    temperature: float = Field(1.0, gt=0)
    """Divides the teacher's logits; a high one weighs the `top` classes equally, as SUN does."""
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    map_free: ClassVar[Mapping[str, Any]] = {"prior": None}

    def needs(self) -> Needs:
        maps = (self.prior,) if self.prior else ()
        heads = {teacher_head(self.teacher, "patch_labels"): Head("patch", "classes+1")}
        return Needs(heads=heads, teacher=("patch_logits",), maps=maps, amounts=maps, one_class=True)

    def loss(self, context: Context) -> Tensor:
        import torch.nn.functional as F

        from dpkd.models.resample import area_resample

        student_BKHW = context.student(teacher_head(self.teacher, "patch_labels"))
        grid = (student_BKHW.shape[2], student_BKHW.shape[3])
        teacher_BKHW = resample_features(context.teacher("patch_logits"), grid)
        figure_B1HW = area_resample(context.map(self.prior), grid) if self.prior else teacher_BKHW.amax(1, keepdim=True)
        label_BKHW = patch_labels(
            teacher_BKHW, figure_B1HW, background=self.background, top=self.top, temperature=self.temperature
        )
        loss_BHW = F.cross_entropy(student_BKHW, label_BKHW, reduction="none", label_smoothing=self.label_smoothing)
        known_B = ~figure_B1HW.isnan().flatten(1).any(1)
        return self.weight * (loss_BHW.mean((1, 2)) * known_B).mean()


def patch_labels(
    logits_BKHW: Tensor, figure_B1HW: Tensor, *, background: float, top: int, temperature: float
) -> Tensor:
    """Label distributions of patches over K classes and background, [B, K + 1, H, W].

    The round(background · N) patches with the lowest figure value are background (the first ones of equal values). Each
    other patch has the softmax over its `top` largest logits. SUN gives each of them the weight 1 instead, so that its
    labels sum to about `top`.
    """
    import torch

    num_background = round(background * figure_B1HW[0].numel())
    rank_BN = figure_B1HW.flatten(1).argsort(dim=1, stable=True).argsort(1)
    background_B1HW = (rank_BN < num_background).view_as(figure_B1HW)
    largest, classes = logits_BKHW.float().topk(min(top, logits_BKHW.shape[1]), dim=1)
    soft_BKHW = torch.zeros_like(logits_BKHW, dtype=torch.float32).scatter(
        1, classes, (largest / temperature).softmax(1)
    )
    return torch.cat([soft_BKHW * ~background_B1HW, background_B1HW], dim=1)


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
