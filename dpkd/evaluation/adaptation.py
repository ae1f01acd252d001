"""Linear heads for new classes from a few embedded shots, and how good they are by cross-validation.

Axes: S shot, V view (the first is the plain one), D embedding, K class, M sample.
"""

from collections.abc import Callable
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

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


def prototypes(embedding_SD: Floats, label_S: Integers) -> Head:
    """The head `(f - m) · c_k` with unit prototypes: its largest logit is the class of the largest cosine.

    A shot is centred on m, the mean of the class means, and gets unit length (SimpleShot, Wang et al. 2019); c_k is the
    unit vector along the mean of the class's shots. |f - m| is equal for all classes, so the rule is linear in f. The
    logits are divided by the spread, so that they have about the size of cosines.
    """
    centre_D, spread = _centre_and_spread(embedding_SD, label_S)
    row_KD = _unit(_class_means(_unit(embedding_SD - centre_D), label_S)) / spread
    return Head(row_KD, -row_KD @ centre_D)


def logistic(embedding_SVD: Floats, label_S: Integers) -> Head:
    """Logistic regression (L2, classes balanced) on all views around their centre, of unit spread.

    All views of a shot together count once. The head reads the embedding as it is.
    """
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415  slow to import

    num_views, dim = embedding_SVD.shape[1:]
    centre_D, spread = _centre_and_spread(embedding_SVD.mean(1), label_S)
    fitted = LogisticRegression(C=STRENGTH / num_views, class_weight="balanced", max_iter=1000).fit(
        ((embedding_SVD - centre_D) / spread).reshape(-1, dim), np.repeat(label_S, num_views)
    )
    weight_KD, bias_K = fitted.coef_ / spread, fitted.intercept_
    if len(weight_KD) == 1:  # of two classes scikit-learn has the difference
        weight_KD, bias_K = np.outer([-0.5, 0.5], weight_KD), np.array([-0.5, 0.5]) * bias_K
    return Head(weight_KD, bias_K - weight_KD @ centre_D)


class Measured(NamedTuple):
    """How a method classified shots that it had not seen, and the scale of its logits for which softmax fits."""

    correct: int
    num_shots: int
    scale: float

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the accuracy by Clopper and Pearson (1934)."""
        from scipy.stats import binomtest  # noqa: PLC0415  slow to import; scikit-learn needs scipy

        low, high = binomtest(self.correct, self.num_shots).proportion_ci(method="exact")
        return float(low), float(high)

    def __str__(self) -> str:
        low, high = self.interval
        counts = f"({self.correct} of {self.num_shots} shots, each left out once)"
        return f"{self.correct / self.num_shots:.1%} {counts}, 95 % interval {low:.1%} to {high:.1%}"


def out_of_fold(classify: Callable[[Integers, Integers], Floats], label_S: Integers, *, seed: int) -> Floats | None:
    """The logits SK of each shot by `classify(shots to learn, shots to classify)`; None if a class has one shot.

    There are `MAX_FOLDS` stratified folds, or as many as the smallest class has shots.
    """
    from sklearn.model_selection import StratifiedKFold  # noqa: PLC0415  slow to import

    num_folds = min(MAX_FOLDS, int(np.bincount(label_S).min()))
    if num_folds < 2:
        return None
    logit_SK = np.empty((len(label_S), label_S.max() + 1))
    for learn, left_out in StratifiedKFold(num_folds, shuffle=True, random_state=seed).split(label_S, label_S):
        logit_SK[left_out] = classify(learn, left_out)
    return logit_SK


def measure(logit_SK: Floats, label_S: Integers) -> Measured:
    """The number of shots whose largest logit is right, and the scale of the smallest log loss.

    The targets are 1 - 1 / (S + 2) and the rest shared among the other classes (Platt 1999), so that the scale stays
    finite where all shots are right.
    """
    num_shots, num_classes = logit_SK.shape
    smoothing = num_classes / (num_classes - 1) / (num_shots + 2)
    logits, labels = torch.from_numpy(logit_SK), torch.from_numpy(label_S)
    log_loss = [cross_entropy(scale * logits, labels, label_smoothing=smoothing).item() for scale in SCALES]
    correct = int((logit_SK.argmax(1) == label_S).sum())
    return Measured(correct, num_shots, float(SCALES[np.argmin(log_loss)]))


def _class_means(embedding_SD: Floats, label_S: Integers) -> Floats:
    return np.stack([embedding_SD[label_S == label].mean(0) for label in range(label_S.max() + 1)])


def _centre_and_spread(embedding_SD: Floats, label_S: Integers) -> tuple[Floats, float]:
    """The mean D of the class means, and the root of the mean squared distance to it."""
    centre_D = _class_means(embedding_SD, label_S).mean(0)
    return centre_D, float(np.sqrt(((embedding_SD - centre_D) ** 2).sum(1).mean()).clip(1e-12))


def _unit(rows_MD: Floats) -> Floats:
    return rows_MD / np.linalg.norm(rows_MD, axis=1, keepdims=True).clip(1e-12)
