"""Few-shot accuracy against scikit-learn, one episode at a time."""

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid
from sklearn.preprocessing import normalize

from dpkd.errors import UserError
from dpkd.evaluation.few_shot import _distinct, draw_episodes, few_shot_accuracy, score
from dpkd.evaluation.settings import EpisodeSettings

SMALL = EpisodeSettings(way=4, shots=(1, 3), queries=5, episodes=60)


def clustered(num_classes: int = 7, per_class: int = 20, dim: int = 12) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    label_N = rng.permutation(np.repeat(np.arange(num_classes), per_class))
    centre_CD = rng.normal(size=(num_classes, dim))
    return centre_CD[label_N] + 1.2 * rng.normal(size=(len(label_N), dim)), label_N


def prepared(embedding_ND: np.ndarray, transform: str, base_mean_D: np.ndarray) -> np.ndarray:
    if transform == "centred_l2":
        embedding_ND = embedding_ND - base_mean_D
    if transform == "power_l2":
        embedding_ND = np.copysign(np.abs(embedding_ND) ** 0.5, embedding_ND)
    return np.asarray(normalize(embedding_ND))


@pytest.mark.parametrize("transform", ["l2", "centred_l2", "power_l2"])
@pytest.mark.parametrize("classifier", ["nearest_centroid", "logistic"])
@pytest.mark.parametrize("shot", [1, 3])
def test_accuracy_is_that_of_scikit_learn_on_each_episode(transform: str, classifier: str, shot: int) -> None:
    embedding_ND, label_N = clustered()
    settings = SMALL.model_copy(update={"transform": transform, "classifier": classifier, "episodes": 25})
    episodes = draw_episodes(label_N, settings, seed=1)
    base_mean_D = embedding_ND[:9].mean(0)
    accuracy = few_shot_accuracy(embedding_ND, episodes, settings=settings, base_mean_D=base_mean_D)
    accuracy_E = accuracy[f"4way_{shot}shot"]

    x_ND = prepared(embedding_ND, transform, base_mean_D)
    for accuracy, support_WK, query_WQ in zip(accuracy_E, episodes.support_EWK, episodes.query_EWQ, strict=True):
        model = NearestCentroid() if classifier == "nearest_centroid" else LogisticRegression(max_iter=1000)
        support = support_WK[:, :shot].ravel()
        with np.errstate(
            invalid="ignore"
        ):  # NearestCentroid divides by the support's degrees of freedom, 0 with 1 shot
            model.fit(x_ND[support], label_N[support])  # the real labels, not the positions that the code uses
        assert accuracy == pytest.approx(model.score(x_ND[query_WQ.ravel()], label_N[query_WQ.ravel()]), abs=1e-9)
    assert 1 / settings.way < accuracy_E.mean() < 1


def test_an_episode_holds_different_classes_and_never_a_sample_twice() -> None:
    _, label_N = clustered()
    label_N[::9] = -1
    episodes = draw_episodes(label_N, SMALL, seed=2)
    for support_WK, query_WQ in zip(episodes.support_EWK, episodes.query_EWQ, strict=True):
        sample_WS = np.concatenate([support_WK, query_WQ], axis=1)
        assert len(np.unique(sample_WS)) == sample_WS.size
        class_WS = label_N[sample_WS]
        assert (class_WS == class_WS[:, :1]).all()
        assert len(np.unique(class_WS[:, 0])) == SMALL.way
        assert (class_WS >= 0).all()


def test_episodes_depend_on_labels_settings_and_seed_alone() -> None:
    _, label_N = clustered()
    first, again = draw_episodes(label_N, SMALL, seed=5), draw_episodes(label_N, SMALL, seed=5)
    other = draw_episodes(label_N, SMALL, seed=6)
    assert (first.support_EWK == again.support_EWK).all()
    assert (first.query_EWQ == again.query_EWQ).all()
    assert (first.query_EWQ != other.query_EWQ).any()


def test_every_ordered_choice_is_equally_likely() -> None:
    rng = np.random.default_rng(0)
    pick_RS = _distinct(rng, np.full(24_000, 4), 3)
    count = Counter(map(tuple, pick_RS.tolist()))
    assert set(count) == set(permutations(range(4), 3))
    chi2 = sum((n - 1000) ** 2 / 1000 for n in count.values())
    assert chi2 < 50  # 23 degrees of freedom: 99.9 % lie below 49.7


def test_classes_with_too_few_samples_are_left_out_and_named() -> None:
    _, label_N = clustered()
    short_N = np.concatenate([label_N, np.full(7, 99)])
    episodes = draw_episodes(short_N, SMALL, seed=0)
    assert episodes.left_out == (99,)
    assert 99 not in short_N[episodes.query_EWQ]


def test_too_few_classes_for_the_way_name_the_split_the_numbers_and_the_way_out() -> None:
    with pytest.raises(UserError, match=r"way=4 .*split 'val' has 3 labelled classes, 2 .* 8 samples .*lower") as error:
        draw_episodes(np.repeat([0, 1, 2], [8, 8, 7]), SMALL, seed=0, split="val")
    assert "queries=5" in str(error.value)


def test_a_diverged_network_has_no_accuracy() -> None:
    embedding_ND, label_N = clustered()
    embedding_ND[4, 2] = np.nan
    with pytest.raises(UserError, match="diverged"):
        few_shot_accuracy(embedding_ND, draw_episodes(label_N, SMALL, seed=0), settings=SMALL)


def test_the_score_is_the_mean_and_its_normal_interval() -> None:
    accuracy_E = np.array([0.2, 0.4, 0.6, 0.8])
    # standard deviation (n - 1): sqrt(0.2 / 3) = 0.258199; / 2 · 1.96 = 0.253035
    assert score(accuracy_E) == pytest.approx({"mean": 0.5, "ci95": 0.253035}, abs=1e-6)


def test_the_interval_holds_the_truth_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    scores = [score(rng.binomial(75, 0.6, size=200) / 75) for _ in range(2000)]
    held = np.mean([abs(each["mean"] - 0.6) < each["ci95"] for each in scores])
    assert 0.93 < held < 0.965


def test_a_paired_difference_has_the_narrower_interval() -> None:
    rng = np.random.default_rng(0)
    hardness_E = rng.uniform(0.2, 0.8, size=500)
    better_E, worse_E = hardness_E + 0.02 + rng.normal(0, 0.02, 500), hardness_E + rng.normal(0, 0.02, 500)
    difference = score(better_E - worse_E)
    assert difference["mean"] == pytest.approx(0.02, abs=0.005)
    assert difference["ci95"] < score(better_E)["ci95"] / 4


def test_collapsed_embeddings_score_at_chance() -> None:
    _, label_N = clustered()
    accuracy = few_shot_accuracy(np.ones((len(label_N), 4)), draw_episodes(label_N, SMALL, seed=0), settings=SMALL)
    assert {key: score(each)["mean"] for key, each in accuracy.items()} == {"4way_1shot": 0.25, "4way_3shot": 0.25}
