"""Zero-shot accuracy through attributes: of classes never seen in training, known by an expert's row of attributes.

Axes: N sample, K class, A attribute. Accuracies are fractions in [0, 1].
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpkd.data.attributes import score_weights

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.int64]


def zero_shot_accuracy(logit_NA: Floats, label_N: Integers, *, class_K: Integers, value_KA: Floats) -> dict[str, float]:
    """Accuracy `overall`, `balanced` (mean over classes) and by `chance` among the classes `class_K`.

    Each sample goes to the class whose row of attributes is most likely under its predicted attribute logits (direct
    attribute prediction, Lampert et al. 2014; `score_weights`). Samples of other classes, or without a label, do not
    count. Between classes described alike the first is taken.
    """
    weight_KA, bias_K = score_weights(value_KA)
    prediction_N = class_K[(logit_NA @ weight_KA.T + bias_K).argmax(1)]
    tested = [label_N == label for label in class_K]
    right_N = prediction_N == label_N
    return {
        "overall": float(right_N[np.isin(label_N, class_K)].mean()),
        "balanced": float(np.mean([right_N[tested_N].mean() for tested_N in tested if tested_N.any()])),
        "chance": 1 / len(class_K),
    }
