"""Distillation of embeddings. Axes: B sample, D features; feature_distance takes features along any dimension."""

import torch.nn.functional as F
from torch import Tensor


def distil_embedding(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """`0.5 (1 - cosine) + 0.5 smooth-L1` between standardised embeddings of one width, mean over samples; a scalar.

    UNIC (Sariyildiz et al. 2024), eq. 1 and 2, with each vector standardised by itself and not by running statistics.
    """
    return feature_distance(student_BD, teacher_BD, dim=1).mean()


def feature_distance(student: Tensor, teacher: Tensor, *, dim: int) -> Tensor:
    """`0.5 (1 - cosine) + 0.5 smooth-L1` of the standardised vectors along `dim`; float32 without that dimension."""
    student, teacher = standardise(student, dim=dim), standardise(teacher, dim=dim)
    cosine = F.cosine_similarity(student, teacher, dim=dim)
    return 0.5 * (1 - cosine) + 0.5 * F.smooth_l1_loss(student, teacher, reduction="none").mean(dim)


def standardise(features: Tensor, *, dim: int) -> Tensor:
    """The features with mean 0 and variance 1 along `dim`, float32: a layer norm without weights, so without state."""
    features = features.float()
    centred = features - features.mean(dim, keepdim=True)
    return centred / (centred.square().mean(dim, keepdim=True) + 1e-6).sqrt()
