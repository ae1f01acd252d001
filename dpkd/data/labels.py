"""How many labels training sees: a deterministic choice, so that label efficiency can be measured. Axes: N samples."""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dpkd.data.settings import AllLabels, LabelsPerClass, ListedLabels, VisibleLabels
from dpkd.data.sources.text import match_lines, read_lines
from dpkd.errors import UserError

Labels = NDArray[np.int64]


def visible_labels(
    label_N: Labels, settings: VisibleLabels, *, keys: Sequence[str], seed: int, unreadable: Labels | Sequence[int] = ()
) -> Labels:
    """The labels [N] that training may see, -1 for the others.

    The choice depends on the seed and the samples' keys, not on how they are packed, and it grows: the labels of a
    smaller count or fraction are among those of a larger one. Of the samples `unreadable` no label is visible, and
    another takes its place where labels are counted.

    Raises `UserError` for a list that does not fit the split.
    """
    readable_N = label_N.copy()
    readable_N[np.asarray(unreadable, np.int64)] = -1
    if isinstance(settings, AllLabels):
        return readable_N
    if isinstance(settings, ListedLabels):
        shown = _listed(label_N, settings.path, keys=keys)
    else:  # the first of each class, in an order drawn from seed and key
        labelled = np.flatnonzero(readable_N >= 0)
        salt = (seed % 2**64).to_bytes(8, "little")
        draws = [hashlib.blake2b(keys[i].encode(), digest_size=8, key=salt).digest() for i in labelled.tolist()]
        ordered = labelled[np.lexsort((np.frombuffer(b"".join(draws), np.uint64), readable_N[labelled]))]
        starts = np.flatnonzero(np.diff(readable_N[ordered], prepend=-1))
        classes = np.split(ordered, starts[1:])
        if isinstance(settings, LabelsPerClass):
            counts = [settings.count] * len(classes)
        else:
            counts = [max(1, round(settings.fraction * len(members))) for members in classes]
        shown = np.concatenate([members[:count] for members, count in zip(classes, counts, strict=True)])
    visible_N = np.full_like(label_N, -1)
    visible_N[shown] = readable_N[shown]
    return visible_N


def _listed(label_N: Labels, path: str, *, keys: Sequence[str]) -> NDArray[np.int64]:
    """The samples that the file lists by key, one a line."""
    numbers, unknown, _ = match_lines(read_lines(path, key="data.labels.path"), {key: i for i, key in enumerate(keys)})
    shown = sorted({number for _, number in numbers})
    without_label = {keys[i] for i in shown if label_N[i] < 0}
    elsewhere = "are not in the split that networks are trained on (data.train)"
    for wrong, reason in ((set(unknown), elsewhere), (without_label, "have no label")):
        if wrong:
            named = ", ".join(map(repr, sorted(wrong)[:3]))
            raise UserError(
                f"data.labels.path={path}: {len(wrong)} of the keys it lists {reason}, as {named}: take them out"
            )
    if not shown:
        raise UserError(f"data.labels.path={path} lists no key: list one a line, or leave data.labels at its default")
    return np.array(shown, np.int64)
