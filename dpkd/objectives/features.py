"""Distillation of embeddings. Axes: B sample, D features; feature_distance accepts features along any dimension."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from dpkd.objectives.base import Context, Distillation, Head, Needs

if TYPE_CHECKING:
    from torch import Tensor


class FeatureDistillation(Distillation):
    """Distance between a head on the student's embedding and the teacher's embedding.

    `unic`: `0.5 (1 - cosine) + 0.5 smooth-L1` of standardised embeddings (UNIC, Sariyildiz et al. 2024). `radio`: `0.9
    (1 - cosine) + 0.1 smooth-L1` of the embeddings as they are (AM-RADIO, Ranzinger et al. 2024).
    """

    kind: Literal["features"] = "features"
    distance: Literal["unic", "radio"] = "unic"
    hidden: int | None = Field(None, ge=1)
    """Width of the hidden layer of an MLP head (layer norm, linear, GELU, linear); None for a linear head."""
    average_views: bool = False
    """Learns from all global views, with targets that are half the mean over the views of an image."""

    def needs(self) -> Needs:
        heads = {self._head: Head("embedding", "teacher.embedding", hidden=self.hidden)}
        return Needs(heads=heads, teacher=("embedding",), num_views=2 if self.average_views else 1)

    def loss(self, context: Context) -> Tensor:
        student_BD = context.student(self._head, all_views=self.average_views)
        teacher_BD = context.teacher("embedding", average_views=self.average_views)
        if self.distance == "unic":
            return self.weight * feature_distance(student_BD, teacher_BD, dim=1).mean()
        return self.weight * weighted_distance(student_BD, teacher_BD, dim=1, cosine=0.9).mean()

    @property
    def _head(self) -> str:
        return teacher_head(self.teacher, f"embedding-{self.hidden}" if self.hidden else "embedding")


def teacher_head(teacher: str | None, output: str) -> str:
    """Name of the head that maps a student's features to the width of one teacher's output."""
    return f"to_teacher/{teacher}/{output}" if teacher else f"to_teacher/{output}"


def feature_distance(student: Tensor, teacher: Tensor, *, dim: int) -> Tensor:
    """`0.5 (1 - cosine) + 0.5 smooth-L1` of the standardised vectors along `dim`; float32 without that dimension.

    UNIC (Sariyildiz et al. 2024), eq. 1 and 2, with the statistics of each vector, not running statistics.
    """
    return weighted_distance(standardise(student, dim=dim), standardise(teacher, dim=dim), dim=dim, cosine=0.5)


def weighted_distance(student: Tensor, teacher: Tensor, *, dim: int, cosine: float) -> Tensor:
    """`w (1 - cosine) + (1 - w) smooth-L1` of the vectors along `dim`, where w is `cosine`; without that dimension."""
    import torch.nn.functional as F

    similarity = F.cosine_similarity(student, teacher, dim=dim)
    smooth = F.smooth_l1_loss(student, teacher, reduction="none").mean(dim)
    return cosine * (1 - similarity) + (1 - cosine) * smooth


def standardise(features: Tensor, *, dim: int) -> Tensor:
    """The features with mean 0 and variance 1 along `dim`, float32: a layer norm without weights or state."""
    features = features.float()
    centred = features - features.mean(dim, keepdim=True)
    return centred / (centred.square().mean(dim, keepdim=True) + 1e-6).sqrt()
