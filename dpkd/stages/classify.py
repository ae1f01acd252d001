"""The evaluation of classifiers on classes that training knows. Axes: N readable sample, K class."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpkd.data.label_file import Labels
from dpkd.data.shards import Split
from dpkd.evaluation.long_tail import calibration_error, confusion, known_hits, long_tail, predict_known, wilson
from dpkd.models.network import Network
from dpkd.stages.networks import Embedded
from dpkd.stages.run import Run

PLAIN = " without its prior map"
"""Marks a second measurement of a figure-ground network, with the pooling of the exported timm model."""
NUM_EXAMPLES = 3
"""Most mistakes of a class that are named by their keys."""


def predictions_of(
    run: Run, networks: Mapping[str, Network], embedded: Mapping[str, Embedded], label_N: Labels
) -> dict[str, NDArray[np.int64]]:
    """The predicted labels of the networks that know all classes of the split; also without a prior map."""
    predictions: dict[str, NDArray[np.int64]] = {}
    for name, outputs in embedded.items():
        known = networks[name.removesuffix(PLAIN)].spec.classes
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
) -> dict[str, dict[str, Any]]:
    """Accuracy of the networks that know all classes of the split, as they are exported: in total and by class."""
    names, count_K, indices = run.dataset.manifest.classes, run.train_counts, run.readable(split.name)
    figures: dict[str, dict[str, Any]] = {"classification": {}, "per_class": defaultdict(dict), "confusion": {}}
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
