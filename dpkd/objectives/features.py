"""Distillation of embeddings. Axes: B sample, D features; feature_distance accepts features along any dimension."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from dpkd.objectives.base import Context, Distillation, Head, Needs

if TYPE_CHECKING:
    from torch import Tensor


class FeatureDistillation(Distillation):
    """`0.5 (1 - cosine) + 0.5 smooth-L1` between standardised embeddings (UNIC, Sariyildiz et al. 2024)."""

    kind: Literal["features"] = "features"

    def needs(self) -> Needs:
        head = Head("embedding", "teacher.embedding")
        return Needs(heads={teacher_head(self.teacher, "embedding"): head}, teacher=("embedding",))

    def loss(self, context: Context) -> Tensor:
        student_BD = context.student(teacher_head(self.teacher, "embedding"))
        return self.weight * feature_distance(student_BD, context.teacher("embedding"), dim=1).mean()


def teacher_head(teacher: str | None, output: str) -> str:
    """Name of the head that maps a student's features to the width of one teacher's output."""
    return f"to_teacher/{teacher}/{output}" if teacher else f"to_teacher/{output}"


def feature_distance(student: Tensor, teacher: Tensor, *, dim: int) -> Tensor:
    """`0.5 (1 - cosine) + 0.5 smooth-L1` of the standardised vectors along `dim`; float32 without that dimension.

    UNIC (Sariyildiz et al. 2024), eq. 1 and 2, with the statistics of each vector, not running statistics.
    """
    import torch.nn.functional as F

    student, teacher = standardise(student, dim=dim), standardise(teacher, dim=dim)
    cosine = F.cosine_similarity(student, teacher, dim=dim)
    return 0.5 * (1 - cosine) + 0.5 * F.smooth_l1_loss(student, teacher, reduction="none").mean(dim)


def standardise(features: Tensor, *, dim: int) -> Tensor:
    """The features with mean 0 and variance 1 along `dim`, float32: a layer norm without weights or state."""
    features = features.float()
    centred = features - features.mean(dim, keepdim=True)
    return centred / (centred.square().mean(dim, keepdim=True) + 1e-6).sqrt()
