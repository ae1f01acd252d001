"""Linear heads for new classes from a few embedded shots, and how good they are by cross-validation.

Axes: S shot, V view (the first is the plain one), D embedding, K class, M sample.
"""

from collections.abc import Callable
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Integers = NDArray[np.signedinteger]

MAX_FOLDS = 5
SCALES = 2.0 ** np.linspace(-6, 6, 121)
"""Factors of the logits that are tried."""
STRENGTH = 10.0
"""C of the logistic head. The best of several is no better, and the figure of 25 shots is then too high."""


class Head(NamedTuple):
    """Logits `weight_KD f + bias_K` of an embedding f."""

    weight_KD: Floats
    bias_K: Floats

    def logits(self, embedding_MD: Floats) -> Floats:
        """The logits, MK."""
        return embedding_MD @ self.weight_KD.T + self.bias_K

    def scaled(self, scale: float) -> Self:
        """The head whose logits are `scale` times as large."""
        return type(self)(scale * self.weight_KD, scale * self.bias_K)


def class_means(embedding_SD: Floats, label_S: Integers) -> Floats:
    """The mean of each class's rows, KD."""
    return np.stack([embedding_SD[label_S == label].mean(0) for label in range(label_S.max() + 1)])


def spread(embedding_SD: Floats, centre_D: Floats) -> float:
    """The root of the mean squared distance to the centre."""
    return float(np.sqrt(((embedding_SD - centre_D) ** 2).sum(1).mean()).clip(1e-12))


def prototypes(embedding_SD: Floats, label_S: Integers, *, centre_D: Floats) -> Head:
    """The head `(f - m) · c_k` with unit prototypes: its largest logit is the class of the largest cosine.

    A shot is centred and gets unit length (SimpleShot, Wang et al. 2019); c_k is the unit vector along the mean of the
    class's shots. |f - m| is equal for all classes, so the rule is linear in f.
    """
    prototype_KD = _unit(class_means(_unit(embedding_SD - centre_D), label_S))
    return Head(prototype_KD, -prototype_KD @ centre_D)


def balanced_prototypes(embedding_SD: Floats, label_S: Integers) -> Head:
    """`prototypes` around the mean of the class means, with logits of about the size of cosines."""
    centre_D = class_means(embedding_SD, label_S).mean(0)
    return prototypes(embedding_SD, label_S, centre_D=centre_D).scaled(1 / spread(embedding_SD, centre_D))


def logistic(embedding_SVD: Floats, label_S: Integers) -> Head:
    """Logistic regression (L2, classes balanced) on all views around their centre, of unit spread.

    All views of a shot together count once. The head reads the embedding as it is.
    """
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415  slow to import

    num_views, dim = embedding_SVD.shape[1:]
    mean_SD = embedding_SVD.mean(1)
    centre_D = class_means(mean_SD, label_S).mean(0)
    size = spread(mean_SD, centre_D)
    fitted = LogisticRegression(C=STRENGTH / num_views, class_weight="balanced", max_iter=1000).fit(
        ((embedding_SVD - centre_D) / size).reshape(-1, dim), np.repeat(label_S, num_views)
    )
    weight_KD, bias_K = fitted.coef_ / size, fitted.intercept_
    if len(weight_KD) == 1:  # of two classes scikit-learn has the difference
        weight_KD, bias_K = np.stack([-weight_KD[0], weight_KD[0]]) / 2, np.concatenate([-bias_K, bias_K]) / 2
    return Head(weight_KD, bias_K - weight_KD @ centre_D)


def folds(label_S: Integers, *, seed: int) -> Integers | None:
    """The fold of each shot, as many of each class in every fold as can be; None if a class has a single shot.

    There are `MAX_FOLDS`, or as many as the smallest class has shots.
    """
    num_folds = min(MAX_FOLDS, int(np.bincount(label_S).min()))
    if num_folds < 2:
        return None
    rng = np.random.Generator(np.random.Philox(seed))
    fold_S = np.empty(len(label_S), np.int64)
    for label in range(label_S.max() + 1):
        members = rng.permutation(np.flatnonzero(label_S == label))
        fold_S[members] = np.arange(len(members)) % num_folds
    return fold_S


def out_of_fold(fit: Callable[[Integers, Integers], Floats], fold_S: Integers) -> Floats:
    """The logits SK of each shot without its fold, by `fit(shots to learn, shots to classify)`."""
    parts = []
    for fold in range(fold_S.max() + 1):
        left_out = np.flatnonzero(fold_S == fold)
        parts.append((left_out, fit(np.flatnonzero(fold_S != fold), left_out)))
    logit_SK = np.empty((len(fold_S), parts[0][1].shape[1]))
    for left_out, logit_MK in parts:
        logit_SK[left_out] = logit_MK
    return logit_SK


class Measured(NamedTuple):
    """How a method classified shots that it had not seen, and the scale of its logits for which softmax fits."""

    correct: int
    num_shots: int
    scale: float

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the accuracy: `exact_interval`."""
        return exact_interval(self.correct, self.num_shots)


def measure(logit_SK: Floats, label_S: Integers) -> Measured:
    """The number of shots whose largest logit is right, and the scale of the smallest log loss.

    The targets are 1 - 1 / (S + 2) and the rest shared among the other classes (Platt 1999), so that the scale stays
    finite where all shots are right.
    """
    num_shots, num_classes = logit_SK.shape
    off = 1 / (num_shots + 2)
    target_SK = np.full(logit_SK.shape, off / (num_classes - 1))
    target_SK[np.arange(num_shots), label_S] = 1 - off

    def log_loss(scale: float) -> float:
        shifted_SK = scale * (logit_SK - logit_SK.max(1, keepdims=True))
        return float((np.log(np.exp(shifted_SK).sum(1)) - (target_SK * shifted_SK).sum(1)).mean())

    correct = int((logit_SK.argmax(1) == label_S).sum())
    return Measured(correct, num_shots, float(min(SCALES, key=log_loss)))


def exact_interval(correct: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share by Clopper and Pearson (1934), from the quantiles of the beta distribution."""
    from scipy.stats import beta  # noqa: PLC0415  slow to import; a part of scikit-learn

    low = beta.ppf(0.025, correct, count - correct + 1) if correct else 0.0
    high = beta.ppf(0.975, correct + 1, count - correct) if correct < count else 1.0
    return float(low), float(high)


def _unit(rows_MD: Floats) -> Floats:
    return rows_MD / np.linalg.norm(rows_MD, axis=1, keepdims=True).clip(1e-12)
