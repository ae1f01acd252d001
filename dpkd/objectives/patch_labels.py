"""Classification of patches by labels of the teacher, with background from a prior map.

Axes: B sample, K class, H W patch grid, N patches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from dpkd.objectives.base import Context, Distillation, Head, Needs
from dpkd.objectives.features import teacher_head
from dpkd.objectives.patches import resample_features

if TYPE_CHECKING:
    from torch import Tensor


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
