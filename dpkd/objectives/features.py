"""Distillation of embeddings: of themselves, and of the relations between the samples of a micro-batch.

Axes: B sample, D features; feature_distance accepts features along any dimension.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from dpkd.objectives.base import Context, Distillation, Head, Needs, Weight

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


class RelationDistillation(Distillation):
    """Relations between the embeddings of a micro-batch: similarities, and RKD's distances and angles.

    The loss depends on the micro-batch size, and not on the number of workers if `micro_batch_size` is set.
    """

    kind: Literal["relations"] = "relations"
    similarity: Weight = 1.0
    """Weight of the divergence between the softmax rows of the cosine matrices."""
    temperature: float = Field(0.1, gt=0)
    """Divides the cosines."""
    distance: Weight = 0.0
    """Weight of RKD's distances; Park et al. use 25."""
    angle: Weight = 0.0
    """Weight of RKD's angles; Park et al. use 50. Memory grows with the cube of the micro-batch size."""
    average_views: bool = False
    """Compares all global views, with targets that are half the mean over the views of an image."""

    def needs(self) -> Needs:
        return Needs(student=("embedding",), teacher=("embedding",), num_views=2 if self.average_views else 1)

    def loss(self, context: Context) -> dict[str, Tensor]:
        import torch.nn.functional as F

        student_BD = context.student("embedding", all_views=self.average_views)
        teacher_BD = context.teacher("embedding", average_views=self.average_views)
        similarity = similarity_divergence(student_BD, teacher_BD, temperature=self.temperature)
        losses = {"similarity": self.weight * self.similarity * similarity}
        if self.distance or self.angle:
            (student_BB, student_BBD), (teacher_BB, teacher_BBD) = gaps(student_BD), gaps(teacher_BD)
            losses["distance"] = self.weight * self.distance * F.smooth_l1_loss(student_BB, teacher_BB)
            if self.angle:
                angle = F.smooth_l1_loss(student_BBD @ student_BBD.mT, teacher_BBD @ teacher_BBD.mT)
                losses["angle"] = self.weight * self.angle * angle
        return losses


def similarity_divergence(student_BD: Tensor, teacher_BD: Tensor, *, temperature: float) -> Tensor:
    """`mean_i KL(softmax_j(cos(t_i, t_j) / τ) ‖ softmax_j(cos(s_i, s_j) / τ))` over all samples j; a scalar.

    The similarity of SEED (Fang et al. 2021), with the micro-batch in place of a queue. Widths may differ.
    """
    import torch.nn.functional as F

    log_p = []
    for embedding_BD in (student_BD, teacher_BD):
        unit_BD = F.normalize(embedding_BD.float(), dim=1)
        log_p.append(F.log_softmax(unit_BD @ unit_BD.T / temperature, dim=1))
    student_BB, teacher_BB = log_p
    return F.kl_div(student_BB, teacher_BB, reduction="batchmean", log_target=True)


def gaps(embedding_BD: Tensor) -> tuple[Tensor, Tensor]:
    """The gaps between embeddings: their lengths divided by the mean over distinct pairs, BB, and directions, BBD.

    RKD (Park et al. 2019, section 3.2) compares by smooth-L1 the lengths `‖x_i - x_j‖ / μ`, as the mean over all pairs,
    and the cosines of angles `e_ij · e_ik` between directions, as the mean over all triplets. Equal embeddings have no
    direction, and no gradient.
    """
    import torch

    gap_BBD = embedding_BD.float()[None] - embedding_BD.float()[:, None]
    length_BB = gap_BBD.norm(dim=2)
    apart_BB = length_BB > 0
    mean = length_BB.sum() / apart_BB.sum().clamp(min=1)
    return length_BB / torch.where(mean > 0, mean, 1), gap_BBD / torch.where(apart_BB, length_BB, 1)[..., None]
