"""kNN and linear probe: the accuracy of simple classifiers on a frozen embedding.

Axes: N sample, D feature.
"""

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler, normalize

from dpkd.evaluation.settings import ProbeSettings

Floats = NDArray[np.floating]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class ProbeSplit:
    """The samples to fit probes and the samples to test them; equal for all models."""

    fit: Integers
    test: Integers


def probe_split(label_N: Integers, settings: ProbeSettings, *, seed: int) -> ProbeSplit | None:
    """Splits the labelled samples of each class; None if fewer than two classes have two samples.

    At most `max_samples` are used, drawn at random.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    chosen = rng.permutation(np.flatnonzero(label_N >= 0))[: settings.max_samples]
    fit, test = [], []
    for label in np.unique(label_N[chosen]):
        members = chosen[label_N[chosen] == label]
        if len(members) < 2:
            continue
        num_fit = int(np.clip(round(settings.train_fraction * len(members)), 1, len(members) - 1))
        fit.append(members[:num_fit])
        test.append(members[num_fit:])
    if len(fit) < 2:
        return None
    return ProbeSplit(np.concatenate(fit), np.concatenate(test))


def probe(embedding_ND: Floats, label_N: Integers, *, split: ProbeSplit, settings: ProbeSettings) -> dict[str, float]:
    """Accuracy on the test samples as `{"knn", "linear"}`, fractions.

    kNN votes among the nearest samples by cosine similarity. The linear probe is logistic regression (L2, C = 1) on
    features standardised by the fit samples.
    """
    fit_label, test_label = label_N[split.fit], label_N[split.test]
    unit_ND = normalize(embedding_ND)
    neighbours = KNeighborsClassifier(min(settings.neighbours, len(split.fit)), metric="euclidean")
    knn = neighbours.fit(unit_ND[split.fit], fit_label).score(unit_ND[split.test], test_label)
    if not settings.linear:
        return {"knn": float(knn)}
    scaler = StandardScaler().fit(embedding_ND[split.fit])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # every model gets the same 300 iterations
        linear = LogisticRegression(max_iter=300).fit(scaler.transform(embedding_ND[split.fit]), fit_label)
    return {"knn": float(knn), "linear": float(linear.score(scaler.transform(embedding_ND[split.test]), test_label))}
