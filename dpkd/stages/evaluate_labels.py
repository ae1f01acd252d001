"""The evaluation where an image may have several labels: average precision and AUROC of each network.

Axes: N readable sample, K label that training has.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpkd.data.label_file import Labels
from dpkd.data.shards import Split
from dpkd.evaluation.multi_label import label_scores, mean_score, measure_labels
from dpkd.stages.classify import PLAIN
from dpkd.stages.networks import Embedded
from dpkd.stages.run import Run

Figures = dict[str, dict[str, Any]]
"""Figures of one kind by network."""


def known_labels(run: Run, split: Split) -> tuple[list[str], Labels, NDArray[np.int64]]:
    """The labels that training has, those of the readable samples NK, and the number K of visible ones in training."""
    trained, names = np.flatnonzero(run.dataset.split(run.data.train).info.class_counts), run.dataset.manifest.classes
    readable = run.readable(split.name)
    return [names[k] for k in trained], split.label_NK[readable][:, trained], run.train_counts[trained]


def label_scores_of(run: Run, split: Split, logits_NK: NDArray[np.float32]) -> dict[str, dict[str, float]]:
    """The scores of one network on the readable samples of a split."""
    _, label_NK, train_count_K = known_labels(run, split)
    measured = measure_labels(logits_NK.astype(np.float64), label_NK, seed=run.seed)
    return label_scores(measured, train_count_K=train_count_K)


def measure_several(
    run: Run,
    embedded: Mapping[str, Embedded],
    split: Split,
    *,
    baselines: Mapping[str, Sequence[str]],
    chosen: dict[str, str],
) -> dict[str, Figures]:
    """The figures of a split by kind, then by network; empty on ranks other than 0.

    `chosen` is the baseline that each student is compared with: the best one on the first split, which is added.
    """
    if run.world.rank != 0:
        return {}
    names, label_NK, train_count_K = known_labels(run, split)
    measured = {
        network: measure_labels(outputs["logits"].astype(np.float64), label_NK, seed=run.seed)
        for network, outputs in embedded.items()
        if "logits" in outputs
    }
    scores = {network: label_scores(each, train_count_K=train_count_K) for network, each in measured.items()}
    gains: Figures = {}
    for student, candidates in baselines.items():
        if not scores[student]:  # no label of the split can be measured
            continue
        best = chosen.setdefault(student, max(candidates, key=lambda name: list(scores[name].values())[-1]["mean"]))
        difference = {key: measured[student][key] - measured[best][key] for key in measured[student]}
        gains[student] = label_scores(difference, train_count_K=train_count_K)
    tables: Figures = {
        network: {
            name: {
                "samples": int((label_NK[:, k] == 1).sum()),
                "trained": int(train_count_K[k]),
                **{key: mean_score(value_RK[:, [k]]) for key, value_RK in each.items()},
            }
            for k, name in enumerate(names)
        }
        for network, each in measured.items()
    }
    exported = [name for name in embedded if not name.endswith(PLAIN)]
    return {
        "few_shot": {name: scores.get(name, {}) for name in exported},
        "plain_pooling": {name: scores[name + PLAIN] for name in exported if name + PLAIN in scores},
        "over_baseline": gains,
        "labels": {name: tables.get(name + PLAIN, tables[name]) for name in exported if name in tables},
    }
