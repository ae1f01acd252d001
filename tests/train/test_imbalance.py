"""The recipe for rare classes: what is chosen from which counts, and the weights against their definition."""

import numpy as np
import pytest

from dpkd.engine.imbalance import class_weights, recipe


@pytest.mark.parametrize(
    ("counts", "kind"),
    [
        ([100, 100], "none"),
        ([299, 100, 200], "none"),
        ([300, 100], "logit_adjusted"),
        ([408, 30, 6], "logit_adjusted"),
        ([408, 0, 200], "none"),  # a class without a label cannot be learnt
        ([408, 0, 0], "none"),
        ([0, 0], "none"),
    ],
)
def test_auto_adjusts_from_a_ratio_of_three_on(counts: list[int], kind: str) -> None:
    assert recipe("auto", "auto", np.array(counts)).kind == kind


def test_what_is_set_wins() -> None:
    count_K = np.array([400, 4])
    assert recipe("auto", "auto", count_K).reason == "the largest class has 400 labels, and the smallest 4"
    assert recipe("deferred", "auto", count_K).kind == "deferred"
    assert recipe("none", "auto", count_K).kind == "none"
    assert recipe("auto", "class_aware", count_K).kind == "class_aware"


def test_weights_are_the_inverse_effective_numbers_with_mean_one_over_the_labels() -> None:
    count_K = np.array([5000, 120, 7, 1])
    effective = [sum(0.9999**power for power in range(count)) for count in count_K]  # Cui et al. 2019, eq. 2
    weight_K = class_weights(count_K)
    np.testing.assert_allclose(weight_K / weight_K[0], effective[0] / np.array(effective), rtol=1e-6)
    assert np.repeat(weight_K.astype(np.float64), count_K).mean() == pytest.approx(1, rel=1e-6)
    np.testing.assert_allclose(class_weights(np.array([9, 9])), [1, 1])
