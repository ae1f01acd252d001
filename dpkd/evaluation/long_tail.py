"""Accuracy on known classes: all, frequent and rare classes.

Axes: N sample, K class. Accuracies are fractions in [0, 1].
"""

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

MANY, FEW = 100, 20
"""More than 100 training samples is many, fewer than 20 few (Liu et al. 2019, OLTR)."""


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
