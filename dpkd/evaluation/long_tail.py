"""Accuracy on known classes, whose images training has seen: all, frequent and rare classes; calibration, confusion.

Also zero-shot accuracy on unseen classes, which an expert's attributes describe.
Axes: N sample, R mistake, K class, C shown class, A attribute. Accuracies are fractions in [0, 1].
"""

from collections.abc import Sequence
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from dpkd.data.attributes import score_weights

Integers = NDArray[np.int64]

ADDED_TO_HITS, ADDED_TO_GAINS = (0.0, 0.0, 1.0, 1.0), (-1.0, 1.0)
"""Added values, so that an interval over few images is not 0 where all are equal (Agresti and Coull 1998; after Agresti
and Min 2005 for paired differences)."""
Z = 1.959964
"""Half a 95 % interval, in standard deviations."""
NUM_BINS = 15
"""Of the calibration error, as in Guo et al. 2017."""
NUM_CONFUSED = 12
"""Most classes that a table of confusions has; the other classes are one."""
MANY, FEW = 100, 20
"""More than 100 training samples is many, fewer than 20 few (Liu et al. 2019, OLTR)."""


def predict_known(
    logits_NK: NDArray[np.float32], label_N: Integers, *, known: Sequence[str], classes: Sequence[str]
) -> Integers | None:
    """The label of the largest logit of each sample, int64 [N]; None if a labelled sample is of no class in `known`.

    Labels are positions in `classes`, the classes of the data set; logits are of the classes `known`.
    """
    if not {classes[label] for label in np.unique(label_N[label_N >= 0])} <= set(known):
        return None
    label_K = np.array([classes.index(name) for name in known])
    prediction_N: Integers = label_K[logits_NK.argmax(1)]
    return prediction_N


def known_hits(prediction_N: Integers, label_N: Integers) -> NDArray[np.float64]:
    """1 for each labelled sample that is classified right, else 0."""
    return (prediction_N == label_N)[label_N >= 0].astype(np.float64)


def long_tail(prediction_N: Integers, label_N: Integers, *, train_count_K: Integers) -> dict[str, float]:
    """Accuracy `overall`, `balanced` (mean over classes), of the `worst_class`, and over `many`, `medium`, `few`.

    The last three are means over the classes with that number of training samples; they are absent without such
    classes. Label -1 does not count.
    """
    known_N = label_N >= 0
    hit_N, label_N = (prediction_N == label_N)[known_N], label_N[known_N]
    tested = np.unique(label_N)
    accuracy = np.array([hit_N[label_N == label].mean() for label in tested])
    count = train_count_K[tested]
    groups = {"many": count > MANY, "medium": (count >= FEW) & (count <= MANY), "few": count < FEW}
    table = {"overall": float(hit_N.mean()), "balanced": float(accuracy.mean()), "worst_class": float(accuracy.min())}
    return table | {name: float(accuracy[chosen].mean()) for name, chosen in groups.items() if chosen.any()}


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count` samples (Wilson 1927), which also holds for few."""
    centre, spread = hits + Z**2 / 2, Z * sqrt(hits * (count - hits) / count + Z**2 / 4)
    return (centre - spread) / (count + Z**2), (centre + spread) / (count + Z**2)


def calibration_error(logits_NK: NDArray[np.float32], hit_N: NDArray[np.float64]) -> float:
    """The expected calibration error (Guo et al. 2017, eq. 3): |confidence - accuracy|, by bins of the confidence."""
    odds_NK = np.exp(logits_NK.astype(np.float64) - logits_NK.max(1, keepdims=True))
    confidence_N = odds_NK.max(1) / odds_NK.sum(1)
    bin_N = np.ceil(confidence_N * NUM_BINS).astype(np.int64)  # a bin has its upper end
    return float(np.abs(np.bincount(bin_N, confidence_N - hit_N)).sum() / len(hit_N))


def confusion(prediction_N: Integers, label_N: Integers) -> tuple[Integers, Integers]:
    """The classes [C] with most mistakes, as label or prediction, and the counts [C + 1, C + 1] of (label, prediction).

    A mistake counts as its share of the samples of its label, so rare classes count like others. The last row and
    column are of all other classes. Label -1 does not count.
    """
    prediction_N, label_N = prediction_N[label_N >= 0], label_N[label_N >= 0]
    wrong_N = prediction_N != label_N
    share_R = 1 / np.bincount(label_N)[label_N[wrong_N]]
    sides = np.concatenate([label_N[wrong_N], prediction_N[wrong_N]])
    mistakes_K = np.bincount(sides, np.tile(share_R, 2), minlength=1)
    class_C = np.sort(np.argsort(-mistakes_K, kind="stable")[:NUM_CONFUSED])
    class_C = class_C[mistakes_K[class_C] > 0]
    place_K = np.full(max(label_N.max(), prediction_N.max()) + 1, len(class_C))
    place_K[class_C] = np.arange(len(class_C))
    counts = np.zeros((len(class_C) + 1, len(class_C) + 1), np.int64)
    np.add.at(counts, (place_K[label_N], place_K[prediction_N]), 1)
    return class_C, counts


def zero_shot_accuracy(
    logit_NA: NDArray[np.floating], label_N: Integers, *, class_K: Integers, value_KA: NDArray[np.floating]
) -> dict[str, float]:
    """Accuracy `overall`, `balanced` (mean over classes) and by `chance`, among the classes `class_K`.

    The prediction for a sample is the class whose attributes are most likely under the predicted attribute logits
    (direct attribute prediction, Lampert et al. 2014; `score_weights`). Samples of other classes, or without a label,
    do not count. Among classes with equal attributes, the first wins.
    """
    weight_KA, bias_K = score_weights(value_KA)
    prediction_N = class_K[(logit_NA @ weight_KA.T + bias_K).argmax(1)]
    tested = [label_N == label for label in class_K]
    hit_N = prediction_N == label_N
    return {
        "overall": float(hit_N[np.isin(label_N, class_K)].mean()),
        "balanced": float(np.mean([hit_N[tested_N].mean() for tested_N in tested if tested_N.any()])),
        "chance": 1 / len(class_K),
    }
