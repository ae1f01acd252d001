"""The figures of networks by labels: on classes that training knows, and where an image may have several labels.

Axes: N readable sample, K class or label that training has.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpkd.data.labels import Labels
from dpkd.data.shards import Split
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
from dpkd.evaluation.multi_label import label_values, mean_score, measure_labels
from dpkd.models.settings import NetworkSpec
from dpkd.report.figures import KNOWN
from dpkd.stages.baselines import baselines
from dpkd.stages.networks import Embedded
from dpkd.stages.run import Run

PLAIN = " without its prior map"
"""Marks a second measurement of a figure-ground network, with the pooling of the exported timm model."""
NUM_EXAMPLES = 3
"""Most mistakes of a class that are named by their keys."""

Figures = dict[str, dict[str, Any]]
"""Figures of one kind by network."""
Values = dict[str, NDArray[np.float64]]
"""By figure, values of one network whose mean is the figure: of episodes, samples or images, or draws for labels."""


def figure_score(key: str, value: NDArray[np.float64], *, gain: bool = False) -> dict[str, float]:
    """`{"mean", "ci95"}` of a figure by its values, or of a gain by the differences of two networks' values."""
    if value.ndim == 2:
        return mean_score(value)
    return score(value, added=() if key != KNOWN else ADDED_TO_GAINS if gain else ADDED_TO_HITS)


def compare(
    run: Run, networks: Collection[str], values: Mapping[str, Values], *, chosen: dict[str, str]
) -> dict[str, Figures]:
    """The scores of the networks, with their own pooling and plainly pooled, and the students' gains over a baseline.

    `chosen` is the baseline of each student: the best one on the first split that measures it, which is added.
    """
    scores = {name: {key: figure_score(key, value) for key, value in by_key.items()} for name, by_key in values.items()}
    candidates: dict[str, list[str]] = defaultdict(list)
    for name, baseline in baselines(run.settings).items():
        if {student := f"students.{baseline.student}", f"baselines.{name}"} <= {*networks} and scores[student]:
            candidates[student].append(f"baselines.{name}")
    gains: Figures = {}
    for student, names in candidates.items():
        best = chosen.setdefault(student, max(names, key=lambda name: list(scores[name].values())[-1]["mean"]))
        gains[student] = {
            key: figure_score(key, value - values[best][key], gain=True) for key, value in values[student].items()
        }
    return {
        "scores": {name: scores.get(name, {}) for name in networks},
        "plain_pooling": {name: scores[name + PLAIN] for name in networks if name + PLAIN in scores},
        "over_baseline": gains,
    }


def measure_several(run: Run, split: Split, embedded: Mapping[str, Embedded]) -> tuple[dict[str, Values], Figures]:
    """By network with logits, the values of its figures where an image may have several labels, and those of labels."""
    names, trained = run.dataset.manifest.classes, np.flatnonzero(run.dataset.split(run.data.train).info.class_counts)
    label_NK, count_K = split.label_NK[run.readable(split.name)][:, trained], run.train_counts[trained]
    values: dict[str, Values] = {}
    tables: Figures = {}
    for network, outputs in embedded.items():
        if "logits" in outputs:
            measured = measure_labels(outputs["logits"].astype(np.float64), label_NK, seed=run.seed)
            values[network] = label_values(measured, train_count_K=count_K)
            tables[network.removesuffix(PLAIN)] = {  # as exported: a plain measurement is the second
                names[label]: {
                    "samples": int((label_NK[:, k] == 1).sum()),
                    "trained": int(count_K[k]),
                    **{
                        key: None if np.isnan(value_RK[0, k]) else mean_score(value_RK[:, [k]])
                        for key, value_RK in measured.items()
                    },
                }
                for k, label in enumerate(trained)
            }
    return values, tables


def predictions_of(
    run: Run, specs: Mapping[str, NetworkSpec], embedded: Mapping[str, Embedded], label_N: Labels
) -> dict[str, NDArray[np.int64]]:
    """The predicted labels of the networks that know all classes of the split; also without a prior map."""
    predictions: dict[str, NDArray[np.int64]] = {}
    for name, outputs in embedded.items():
        known = specs[name.removesuffix(PLAIN)].classes
        if "logits" in outputs:
            prediction_N = predict_known(outputs["logits"], label_N, known=known, classes=run.dataset.manifest.classes)
            predictions |= {} if prediction_N is None else {name: prediction_N}
    return predictions


def classify(
    run: Run,
    split: Split,
    embedded: Mapping[str, Embedded],
    predictions: Mapping[str, NDArray[np.int64]],
    label_N: Labels,
) -> dict[str, Figures]:
    """Accuracy of the networks that know all classes of the split, as they are exported: in total and by class."""
    names, count_K, indices = run.dataset.manifest.classes, run.train_counts, run.readable(split.name)
    figures: dict[str, Figures] = {"classification": {}, "per_class": defaultdict(dict), "confusion": {}}
    for name in (name for name in predictions if not name.endswith(PLAIN)):
        exported = name + PLAIN if name + PLAIN in predictions else name
        prediction_N, logits_NK = predictions[exported], embedded[exported]["logits"]
        error = calibration_error(logits_NK[label_N >= 0], known_hits(prediction_N, label_N))
        table = long_tail(prediction_N, label_N, train_count_K=count_K)
        figures["classification"][name] = table | {"calibration_error": error}
        class_C, counts = confusion(prediction_N, label_N)
        figures["confusion"][name] = {"classes": [names[label] for label in class_C], "counts": counts.tolist()}
        for label in np.unique(label_N[label_N >= 0]):
            wrong_N, samples = (label_N == label) & (prediction_N != label), int((label_N == label).sum())
            wrong = prediction_N[wrong_N]
            figures["per_class"][name][names[label]] = {
                "train": int(count_K[label]),
                "samples": samples,
                "accuracy": 1 - len(wrong) / samples,
                "ci95": wilson(samples - len(wrong), samples),
                "mistaken_for": names[np.bincount(wrong).argmax()] if len(wrong) else None,
                "examples": [split.keys[i] for i in indices[wrong_N][:NUM_EXAMPLES]],
            }
    return figures
