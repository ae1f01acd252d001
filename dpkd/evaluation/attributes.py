"""Zero-shot accuracy by attributes: on classes without training samples, described by an expert's attributes.

Axes: N sample, K class, A attribute. Accuracies are fractions in [0, 1].
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpkd.data.attributes import score_weights

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.int64]


def zero_shot_accuracy(logit_NA: Floats, label_N: Integers, *, class_K: Integers, value_KA: Floats) -> dict[str, float]:
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
