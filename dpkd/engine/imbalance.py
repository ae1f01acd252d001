"""Recipes against imbalanced labels, chosen by the counts of the visible labels. Axes: K class."""

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Imbalance = Literal["none", "auto", "logit_adjusted", "class_aware", "deferred"]
Sampling = Literal["auto", "uniform", "class_aware"]

BALANCED = 3.0
"""Below this ratio of the largest to the smallest class, `auto` changes nothing."""
DEFERRED = 0.8
"""The share of the steps after which deferred weights count: epoch 160 of 200 (Cao et al. 2019, LDAM-DRW)."""
BETA = 0.9999
"""Of the effective number of samples (Cui et al. 2019)."""


class Recipe(NamedTuple):
    """What a training does for rare classes: at most one of the kinds that are not `none`, and why."""

    kind: Literal["none", "logit_adjusted", "class_aware", "deferred"]
    reason: str

    def __str__(self) -> str:
        name = "no recipe" if self.kind == "none" else self.kind.replace("_", " ")
        return f"{name} for rare classes, because {self.reason}"


def recipe(imbalance: Imbalance, sampling: Sampling, count_K: NDArray[np.integer]) -> Recipe:
    """The recipe of a training; classes without a visible label do not count.

    A `sampling` that is set stays: `auto` adds nothing to class-aware batches, which are balanced already.
    """
    if imbalance != "auto":
        return Recipe(imbalance, "set")
    if sampling == "class_aware":
        return Recipe("class_aware", "training.sampling is set")
    count_K = count_K[count_K > 0]
    if len(count_K) < 2:
        return Recipe("none", f"labels of {len(count_K)} classes are visible")
    words = f"the largest class has {count_K.max():,} labels, and the smallest {count_K.min():,}"
    return Recipe("none" if count_K.max() < BALANCED * count_K.min() else "logit_adjusted", words)


def class_weights(count_K: NDArray[np.integer]) -> NDArray[np.float32]:
    """Weights by the inverse effective number of samples (1 - BETA^n) / (1 - BETA), with mean 1 over the labels."""
    count_K = np.maximum(count_K, 1).astype(np.float64)
    weight_K = (1 - BETA) / (1 - BETA**count_K)
    mean_weight = (count_K * weight_K).sum() / count_K.sum()
    return (weight_K / mean_weight).astype(np.float32)
