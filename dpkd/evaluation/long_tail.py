"""Accuracy on known classes, whose images training has seen: all, frequent and rare classes.

Axes: N sample, K class. Accuracies are fractions in [0, 1].
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

ADDED_TO_HITS, ADDED_TO_GAINS = (0.0, 0.0, 1.0, 1.0), (-1.0, 1.0)
"""Added values, so that an interval over few images is not 0 where all are equal (Agresti and Coull 1998; after Agresti
and Min 2005 for paired differences)."""
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
