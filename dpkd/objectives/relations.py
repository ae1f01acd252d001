"""Distillation of the relations between the samples of a micro-batch. Axes: B sample, D features."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from dpkd.objectives.base import Context, Distillation, Needs, Weight

if TYPE_CHECKING:
    from torch import Tensor


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
