"""Zero-shot accuracy through attributes, against a decision made sample by sample."""

import numpy as np
import pytest
from scipy.special import expit, rel_entr

from dpkd.evaluation.long_tail import zero_shot_accuracy

RNG = np.random.default_rng(0)


def test_it_is_the_share_of_samples_whose_own_row_is_most_likely():
    value_KA, class_K = RNG.uniform(size=(4, 5)), np.array([2, 5, 6, 9])
    label_N = RNG.choice([-1, 0, 2, 2, 2, 5, 6, 9], size=200)
    row_N = np.searchsorted(class_K, label_N).clip(0, 3)
    share_NA = np.clip(value_KA[row_N] + RNG.normal(scale=0.25, size=(200, 5)), 0.02, 0.98)
    logit_NA = np.log(share_NA / (1 - share_NA))
    right: dict[int, list[bool]] = {label: [] for label in class_K.tolist()}
    for logit_A, label in zip(logit_NA, label_N.tolist(), strict=True):
        if label in right:
            p_A = expit(logit_A)
            divergences = [(rel_entr(row_A, p_A) + rel_entr(1 - row_A, 1 - p_A)).sum() for row_A in value_KA]
            right[label].append(class_K[int(np.argmin(divergences))] == label)
    table = zero_shot_accuracy(logit_NA, label_N, class_K=class_K, value_KA=value_KA)
    assert table["overall"] == pytest.approx(np.mean(np.concatenate(list(right.values()))))
    assert table["balanced"] == pytest.approx(np.mean([np.mean(each) for each in right.values()]))
    assert table["chance"] == 0.25
    assert 0.5 < table["overall"] < 1


def test_binary_rows_decide_as_direct_attribute_prediction():
    value_KA = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 1]])
    share_NA = RNG.uniform(0.01, 0.99, size=(300, 3))
    likelihood_NK = np.where(value_KA == 1, share_NA[:, None], 1 - share_NA[:, None]).prod(2)  # Lampert et al., eq. 2
    table = zero_shot_accuracy(
        np.log(share_NA / (1 - share_NA)),
        likelihood_NK.argmax(1) + 7,
        class_K=np.array([7, 8, 9]),
        value_KA=value_KA,
    )
    assert table == {"overall": 1, "balanced": 1, "chance": pytest.approx(1 / 3)}
