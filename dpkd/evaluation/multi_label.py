"""Average precision and AUROC where an image may have several labels, with intervals by the bootstrap over images.

Axes: N sample, K label, R bootstrap draw (the first weighs all samples alike), T distinct score of a label.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from dpkd.data.labels import Labels

Floats = NDArray[np.float64]

NUM_DRAWS, Z_95 = 500, 1.96
AT_ONCE = 1 << 22
"""Weights in memory."""
RARE = 20
"""A label with fewer visible samples in training is rare."""


def ranking_scores(score_N: Floats, has_N: NDArray[np.bool_], weight_RN: Floats) -> tuple[Floats, Floats]:
    """Average precision and AUROC R of one label for weighted samples; NaN without a positive or a negative.

    Equal scores are one threshold: as `average_precision_score` and `roc_auc_score` of scikit-learn.
    """
    order = np.argsort(-score_N, kind="stable")
    last_T = np.flatnonzero(np.append(np.diff(score_N[order]), -1.0))
    true_RT = np.cumsum(weight_RN[:, order] * has_N[order], axis=1)[:, last_T]
    false_RT = np.cumsum(weight_RN[:, order] * ~has_N[order], axis=1)[:, last_T]
    gained_RT, lost_RT = np.diff(true_RT, prepend=0), np.diff(false_RT, prepend=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision_RT = np.nan_to_num(true_RT / (true_RT + false_RT))
        precision_R = (gained_RT * precision_RT).sum(1) / true_RT[:, -1]
        area_R = (lost_RT * (true_RT - gained_RT / 2)).sum(1) / (true_RT[:, -1] * false_RT[:, -1])
    precision_R[false_RT[:, -1] == 0] = np.nan
    return precision_R, area_R


def measure_labels(score_NK: Floats, label_NK: Labels, *, seed: int) -> dict[str, Floats]:
    """`precision` and `auroc` RK of scores, NaN for a label of which the samples with a known value are all alike.

    The same samples and seed give the same draws, so that differences between networks are paired.
    """
    rng, num, parts = np.random.Generator(np.random.Philox(seed)), len(label_NK), list[Floats]()
    at_once = max(1, AT_ONCE // num)
    for start in range(0, 1 + NUM_DRAWS, at_once):
        weight_RN = rng.multinomial(num, np.full(num, 1 / num), min(at_once, 1 + NUM_DRAWS - start)).astype(np.float64)
        if start == 0:
            weight_RN[0] = 1
        part_2RK = np.full((2, len(weight_RN), label_NK.shape[1]), np.nan)
        for k, (score_N, label_N) in enumerate(zip(score_NK.T, label_NK.T, strict=True)):
            known_N = label_N >= 0
            has_N = label_N[known_N] == 1
            if 0 < has_N.sum() < len(has_N):
                part_2RK[:, :, k] = ranking_scores(score_N[known_N], has_N, weight_RN[:, known_N])
        parts.append(part_2RK)
    precision_RK, auroc_RK = np.concatenate(parts, 1)
    return {"precision": precision_RK, "auroc": auroc_RK}


def mean_score(value_RK: Floats) -> dict[str, float]:
    """Mean over the labels that can be measured, and half of its 95 % interval; one of them can be."""
    measured_RK = value_RK[:, ~np.isnan(value_RK[0])]
    # a draw may lack the few samples with a label
    mean_R = np.ma.masked_invalid(measured_RK).mean(1)
    return {"mean": float(mean_R[0]), "ci95": float(Z_95 * mean_R[1:].std())}


def label_values(measured: Mapping[str, Floats], *, train_count_K: NDArray[np.int64]) -> dict[str, Floats]:
    """By figure, values RK for `mean_score`: `auroc`, `average_precision_of_rare_labels`, `mean_average_precision`.

    A figure that no label has is left out, and rare labels where all are rare.
    """
    rare_K = train_count_K < RARE
    values = {
        "auroc": measured["auroc"],
        "average_precision_of_rare_labels": measured["precision"][:, rare_K & (not rare_K.all())],
        "mean_average_precision": measured["precision"],
    }
    return {key: value_RK for key, value_RK in values.items() if not np.isnan(value_RK[0]).all()}
