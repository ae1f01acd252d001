"""N-way K-shot accuracy over episodes that are equal for all models.

Axes: N samples, D embedding, E episodes, W ways (classes of an episode), K shots (support samples a class), Q queries a
class. Accuracies are fractions in [0, 1].
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpkd.errors import UserError
from dpkd.evaluation.settings import EpisodeSettings

Floats = NDArray[np.floating]
Integers = NDArray[np.signedinteger]

CHUNK_BYTES = 64 << 20
"""Size of the query embeddings in memory at a time."""


@dataclass(frozen=True)
class Episodes:
    """Sample indices of every episode; fewer shots use the first of each class, and all shots use the same queries."""

    support_EWK: Integers
    query_EWQ: Integers
    left_out: tuple[int, ...]
    """Classes with too few samples, which are never drawn."""


def draw_episodes(label_N: Integers, settings: EpisodeSettings, *, seed: int, split: str = "evaluation") -> Episodes:
    """Draws the episodes of a split; they depend only on labels, settings and seed. Label -1 is never drawn.

    Raises `UserError` if fewer than `way` classes have `max(shots) + queries` samples.
    """
    count_K = np.bincount(label_N[label_N >= 0])
    class_C, num_drawn = drawable_classes(count_K, settings, split=split), max(settings.shots) + settings.queries
    rng = np.random.Generator(np.random.Philox(seed))
    order_N = np.argsort(label_N, kind="stable")
    first_C = np.searchsorted(label_N[order_N], class_C)
    way_EW = _distinct(rng, np.full(settings.episodes, len(class_C)), settings.way)
    row_R = way_EW.ravel()
    pick_RS = _distinct(rng, count_K[class_C][row_R], num_drawn)
    sample_EWS = order_N[first_C[row_R][:, None] + pick_RS].reshape(*way_EW.shape, num_drawn)
    return Episodes(
        support_EWK=sample_EWS[..., : max(settings.shots)],
        query_EWQ=sample_EWS[..., max(settings.shots) :],
        left_out=tuple(np.setdiff1d(np.flatnonzero(count_K), class_C).tolist()),
    )


def drawable_classes(count_K: Integers, settings: EpisodeSettings, *, split: str) -> Integers:
    """The classes with the `max(shots) + queries` samples of an episode; raises `UserError` if they are below `way`."""
    num_drawn = max(settings.shots) + settings.queries
    class_C = np.flatnonzero(count_K >= num_drawn)
    if len(class_C) < settings.way:
        raise UserError(
            f"evaluate.episodes.way={settings.way} is too large: split {split!r} has {np.count_nonzero(count_K)} "
            f"labelled classes, {len(class_C)} of them with the {num_drawn} samples of an episode "
            f"(shots={list(settings.shots)}, queries={settings.queries}); lower .way, .queries or .shots, or change "
            "data.splits"
        )
    return class_C


def _distinct(rng: np.random.Generator, size_R: Integers, count: int) -> Integers:
    """Draws `count` different numbers below `size_R` in each row; all ordered choices are equally likely."""
    pick_RS = np.empty((len(size_R), count), np.int64)
    for column in range(count):
        draw_R = rng.integers(0, size_R - column)
        for taken_R in np.sort(pick_RS[:, :column], axis=1).T:
            draw_R += draw_R >= taken_R
        pick_RS[:, column] = draw_R
    return pick_RS


def few_shot_accuracy(
    embedding_ND: Floats, episodes: Episodes, *, settings: EpisodeSettings, base_mean_D: Floats | None = None
) -> dict[str, NDArray[np.float64]]:
    """The accuracy on the queries of each episode, float64 [E], for every number of shots (`5way_1shot`).

    Embeddings get unit length after `settings.transform`. `l2` changes nothing before; `centred_l2` subtracts the
    training split's mean embedding (SimpleShot, Wang et al. 2019); `power_l2` takes the square root of the magnitude
    (Hu et al. 2021) and keeps the sign.

    Raises `UserError` if an embedding is not finite, because a diverged network has no accuracy.
    """
    if not np.isfinite(embedding_ND).all():
        raise UserError(
            "the network's embeddings have NaN or infinity, so training diverged: lower optimizer.learning_rate or set "
            "optimizer.clip"
        )
    x_ND = np.asarray(embedding_ND, np.float32)
    if settings.transform == "centred_l2":
        assert base_mean_D is not None, "centred_l2 needs the mean embedding of the training split"
        x_ND = x_ND - np.asarray(base_mean_D, np.float32)
    elif settings.transform == "power_l2":
        x_ND = np.sign(x_ND) * np.sqrt(np.abs(x_ND))
    x_ND = x_ND / np.maximum(np.linalg.norm(x_ND, axis=1, keepdims=True), 1e-12)
    classify = _nearest_centroid if settings.classifier == "nearest_centroid" else _logistic
    num_episodes, way, queries = episodes.query_EWQ.shape
    chunk = max(1, CHUNK_BYTES // (4 * way * queries * x_ND.shape[1]))
    truth_M = np.repeat(np.arange(way), queries)
    accuracy = {}
    for shot in settings.shots:
        support_EWK = episodes.support_EWK[..., :shot]
        classes = [
            classify(x_ND, support_EWK[i : i + chunk], episodes.query_EWQ[i : i + chunk])
            for i in range(0, num_episodes, chunk)
        ]
        accuracy[f"{settings.way}way_{shot}shot"] = (np.concatenate(classes) == truth_M).mean(axis=1, dtype=np.float64)
    return accuracy


def _nearest_centroid(x_ND: Floats, support_EWK: Integers, query_EWQ: Integers) -> Integers:
    """The class whose mean support embedding is nearest to each query (Snell et al. 2017, eq. 1 and 2)."""
    centroid_EWD = x_ND[support_EWK].mean(axis=2)
    query_EMD = x_ND[query_EWQ.reshape(len(query_EWQ), -1)]
    # |q - c|² without |q|², which is equal for all classes
    distance_EMW = (centroid_EWD**2).sum(-1)[:, None] - 2 * query_EMD @ centroid_EWD.transpose(0, 2, 1)
    return distance_EMW.argmin(-1)


def _logistic(x_ND: Floats, support_EWK: Integers, query_EWQ: Integers) -> Integers:
    """The prediction of a logistic regression (L2, C = 1) on each episode's support (Tian et al. 2020)."""
    way, shot = support_EWK.shape[1:]
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415  slow to import, which would delay restarts

    label_S = np.repeat(np.arange(way), shot)
    return np.stack(
        [
            LogisticRegression(max_iter=1000).fit(x_ND[support_WK.ravel()], label_S).predict(x_ND[query_WQ.ravel()])
            for support_WK, query_WQ in zip(support_EWK, query_EWQ, strict=True)
        ]
    )


def score(accuracy_E: NDArray[np.float64], *, added: Sequence[float] = ()) -> dict[str, float]:
    """`{"mean", "ci95"}`: the mean over episodes, and half its normal 95 % interval, 1.96 · standard deviation / √E.

    For two networks on the same episodes, the score of the differences has a narrower interval. `added` values belong
    to the interval alone: it reaches the farther end of theirs.
    """
    value_E = np.append(accuracy_E, added)
    ci95 = 1.96 * value_E.std(ddof=1) / np.sqrt(len(value_E)) + abs(value_E.mean() - accuracy_E.mean())
    return {"mean": float(accuracy_E.mean()), "ci95": float(ci95)}
