"""Measures how often the 95 % interval of `dpkd adapt` covers the accuracy on all other images of the classes.

    python -m tools.bench_adapt --export runs/quickstart/export/conv --data data/miniimagenet_dev/novel

A task is 5 random classes with some shots of each. `auto` chooses among the two linear methods.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dpkd.data.images import decode_image
from dpkd.evaluation.adaptation import (
    Floats,
    Head,
    Integers,
    logistic,
    measure,
    out_of_fold,
    prototypes,
)
from dpkd.evaluation.exported import Exported
from dpkd.log import Progress


def main(arguments: list[str] | None = None) -> None:
    """Prints a line for each number of shots and method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", type=Path, required=True, help="exported student")
    parser.add_argument("--data", type=Path, required=True, help="folder of class folders")
    parser.add_argument("--shots", type=int, nargs="+", default=[5, 20])
    parser.add_argument("--tasks", type=int, default=200)
    options = parser.parse_args(arguments)
    exported, embeddings = Exported(options.export), []
    paths = sorted(options.data.glob("*/*"))
    with Progress("embedded", len(paths)) as progress:
        for i, path in enumerate(paths):
            embeddings.append(exported.embed(exported.views(decode_image(path.read_bytes()), seed=0, index=i)))
            progress.advance()
    x_NVD, label_N = np.stack(embeddings), np.unique([path.parent.name for path in paths], return_inverse=True)[1]
    rng = np.random.Generator(np.random.Philox(0))
    for shots in options.shots:
        rows = [_task(x_NVD, label_N, shots, rng) for _ in range(options.tasks)]
        for name, row in zip(("prototypes", "logistic", "auto"), np.mean(rows, 0).tolist(), strict=True):
            figures = "accuracy {:.3f}, by cross-validation {:.3f}, covered {:.3f}, width {:.3f}".format(*row)
            print(f"{shots} shots, {name}: {figures}", flush=True)


def _task(x_NVD: Floats, label_N: Integers, shots: int, rng: np.random.Generator) -> list[tuple[float, ...]]:
    parts = [rng.permutation(np.flatnonzero(label_N == k)) for k in rng.permutation(label_N.max() + 1)[:5]]
    x_SVD, label_S = x_NVD[np.concatenate([part[:shots] for part in parts])], np.repeat(np.arange(5), shots)
    test_MD = x_NVD[np.concatenate([part[shots:] for part in parts]), 0]
    label_M = np.repeat(np.arange(5), [len(part) - shots for part in parts])

    def figures(fit: Callable[[Floats, Integers], Head]) -> tuple[float, ...]:
        def classify(learn: Integers, left_out: Integers) -> Floats:
            return fit(x_SVD[learn], label_S[learn]).logits(x_SVD[left_out, 0])

        logit_SK = out_of_fold(classify, label_S, seed=0)
        assert logit_SK is not None, "one shot measures nothing"
        measured = measure(logit_SK, label_S)
        accuracy = float((fit(x_SVD, label_S).logits(test_MD).argmax(1) == label_M).mean())
        low, high = measured.interval
        return accuracy, measured.correct / measured.num_shots, float(low <= accuracy <= high), high - low

    rows = [figures(lambda x_SVD, label_S: prototypes(x_SVD.mean(1), label_S)), figures(logistic)]
    return [*rows, max(rows, key=lambda row: row[1])]  # on a tie prototypes


if __name__ == "__main__":
    main()
