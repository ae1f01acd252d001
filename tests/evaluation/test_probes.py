"""Probes and long-tail accuracy against scikit-learn and worked values."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler

from dpkd.evaluation.few_shot import score
from dpkd.evaluation.long_tail import (
    ADDED_TO_GAINS,
    ADDED_TO_HITS,
    calibration_error,
    confusion,
    known_hits,
    long_tail,
    predict_known,
    wilson,
)
from dpkd.evaluation.probes import ProbeSplit, probe, probe_split
from dpkd.evaluation.settings import ProbeSettings


def clustered() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    label_N = np.repeat(np.arange(4), [40, 30, 20, 10])
    return rng.normal(size=(4, 8))[label_N] + rng.normal(size=(100, 8)), label_N


def test_probes_are_those_of_scikit_learn() -> None:
    embedding_ND, label_N = clustered()
    fit, test = train_test_split(np.arange(100), random_state=0, stratify=label_N)
    table = probe(embedding_ND, label_N, split=ProbeSplit(fit, test), settings=ProbeSettings(neighbours=5))
    cosine = make_pipeline(Normalizer(), KNeighborsClassifier(5, metric="cosine"))
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    for name, model in (("knn", cosine), ("linear", linear)):
        expected = model.fit(embedding_ND[fit], label_N[fit]).score(embedding_ND[test], label_N[test])
        assert table[name] == pytest.approx(expected)
        assert 0.5 < table[name] < 1


def test_the_halves_hold_every_class_and_share_no_sample() -> None:
    _, label_N = clustered()
    label_N[:5] = -1
    split = probe_split(label_N, ProbeSettings(train_fraction=0.25), seed=3)
    assert split is not None
    assert sorted(np.concatenate([split.fit, split.test])) == list(range(5, 100))
    fit_count, test_count = np.bincount(label_N[split.fit]), np.bincount(label_N[split.test])
    assert fit_count.tolist() == [9, 8, 5, 2]
    assert test_count.tolist() == [26, 22, 15, 8]
    again = probe_split(label_N, ProbeSettings(train_fraction=0.25), seed=3)
    assert again is not None
    assert (split.fit == again.fit).all()


def test_a_large_split_is_probed_on_a_random_part() -> None:
    label_N = np.arange(1000) % 10
    split = probe_split(label_N, ProbeSettings(max_samples=200), seed=0)
    assert split is not None
    assert len(split.fit) + len(split.test) == 200


@pytest.mark.parametrize("labels", [[0, 0, 0, 1], [-1, -1, -1], [0, 1, 2]])
def test_a_split_without_two_classes_of_two_samples_is_not_probed(labels: list[int]) -> None:
    assert probe_split(np.array(labels), ProbeSettings(), seed=0) is None


def test_long_tail_accuracy_is_that_of_scikit_learn_and_of_each_group() -> None:
    label_N = np.repeat([0, 1, 2, 3], [8, 4, 2, 2])
    prediction_N = np.array([0] * 8 + [1, 1, 1, 0] + [2, 0] + [0, 0])  # right: 8 of 8, 3 of 4, 1 of 2, 0 of 2
    table = long_tail(prediction_N, label_N, train_count_K=np.array([500, 101, 20, 19]))
    assert table["overall"] == pytest.approx(accuracy_score(label_N, prediction_N))
    assert table["balanced"] == pytest.approx(balanced_accuracy_score(label_N, prediction_N))
    assert {name: table[name] for name in ("worst_class", "many", "medium", "few")} == {
        "worst_class": 0.0,
        "many": 0.875,
        "medium": 0.5,
        "few": 0.0,
    }


def test_predictions_are_labels_of_the_data_set_and_need_all_classes() -> None:
    classes, logits_NK = ("ant", "bee", "cat"), np.array([[1, 2], [3, 0], [0, 1]], np.float32)
    label_N = np.array([0, 2, -1])
    prediction_N = predict_known(logits_NK, label_N, known=("cat", "ant"), classes=classes)
    assert prediction_N is not None
    assert prediction_N.tolist() == [0, 2, 0]
    assert known_hits(prediction_N, label_N).tolist() == [1.0, 1.0]
    assert predict_known(logits_NK, np.array([0, 1]), known=("cat", "ant"), classes=classes) is None


@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("count", [5, 20, 100])
def test_intervals_of_few_images_hold_the_truth(share: float, count: int) -> None:
    def coverage(truth: float, drawn_RN: NDArray[np.float64], added: tuple[float, ...]) -> float:
        scores = [score(value_N, added=added) for value_N in drawn_RN]
        return float(np.mean([abs(each["mean"] - truth) <= each["ci95"] for each in scores]))

    rng = np.random.default_rng(0)
    hit_RN, other_RN = (rng.binomial(1, p, (2000, count)).astype(np.float64) for p in (share, share - 0.1))
    assert coverage(share, hit_RN, ADDED_TO_HITS) > 0.9
    assert coverage(0.1, hit_RN - other_RN, ADDED_TO_GAINS) > 0.9


def test_groups_without_a_class_are_absent_and_unlabelled_samples_do_not_count() -> None:
    table = long_tail(np.array([0, 1, 1]), np.array([0, 1, -1]), train_count_K=np.array([500, 500]))
    assert table == {"overall": 1.0, "balanced": 1.0, "worst_class": 1.0, "many": 1.0}


@pytest.mark.parametrize(("hits", "count"), [(0, 1), (1, 1), (3, 7), (50, 60), (0, 400)])
def test_the_interval_of_a_class_is_that_of_scipy(hits: int, count: int) -> None:
    expected = stats.binomtest(hits, count).proportion_ci(method="wilson")
    assert wilson(hits, count) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_the_calibration_error_is_that_of_a_loop_over_the_bins() -> None:
    rng = np.random.default_rng(0)
    logits_NK = rng.normal(0, 2, (500, 4)).astype(np.float32)
    hit_N = rng.integers(0, 2, 500).astype(np.float64)
    confidence_N = softmax(logits_NK.astype(np.float64), axis=1).max(1)
    expected = 0.0
    for lower in np.arange(15) / 15:
        inside = (confidence_N > lower) & (confidence_N <= lower + 1 / 15)
        if inside.any():
            expected += inside.mean() * abs(hit_N[inside].mean() - confidence_N[inside].mean())
    assert calibration_error(logits_NK, hit_N) == pytest.approx(expected, rel=1e-6)
    sure = np.array([[900.0, 0.0]], np.float32)  # confidence 1 is in the last bin
    assert calibration_error(sure, np.ones(1)) == 0


@pytest.mark.parametrize("num_classes", [5, 40])
def test_confusions_are_those_of_scikit_learn_with_the_least_confused_classes_as_one(num_classes: int) -> None:
    rng = np.random.default_rng(1)
    label_N, prediction_N = rng.integers(-1, num_classes, 900), rng.integers(0, num_classes, 900)
    label_N[:700] //= 2  # the lower half of the classes is frequent
    class_C, counts = confusion(prediction_N, label_N)
    assert len(class_C) == min(num_classes, 12)
    known_N, others = label_N >= 0, len(class_C)
    folded_of = np.array([list(class_C).index(k) if k in class_C else others for k in range(num_classes)])
    expected = confusion_matrix(folded_of[label_N[known_N]], folded_of[prediction_N[known_N]], labels=range(others + 1))
    np.testing.assert_array_equal(counts, expected)
    whole = confusion_matrix(label_N[known_N], prediction_N[known_N], labels=range(num_classes))
    share_KK = whole / np.maximum(whole.sum(1, keepdims=True), 1)
    mistakes_K = share_KK.sum(0) + share_KK.sum(1) - 2 * share_KK.diagonal()
    assert mistakes_K[class_C].min() >= np.delete(mistakes_K, class_C).max(initial=0)


def test_without_a_mistake_no_class_is_confused() -> None:
    class_C, counts = confusion(np.array([0, 2, 2]), np.array([0, 2, -1]))
    assert (class_C.tolist(), counts.tolist()) == ([], [[2]])
