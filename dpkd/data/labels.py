"""Chooses the labels visible to training, deterministically, to measure label efficiency. Axes: N samples."""

import hashlib
from collections.abc import Iterable, Sequence
from itertools import compress

import numpy as np
from numpy.typing import NDArray

from dpkd.data.label_file import Labels
from dpkd.data.settings import AllLabels, LabelsPerClass, ListedLabels, VisibleLabels
from dpkd.data.sources.text import match_lines, read_lines
from dpkd.errors import UserError


def visible_labels(
    label_N: Labels, settings: VisibleLabels, *, keys: Iterable[str], seed: int, unreadable: Labels | Sequence[int] = ()
) -> Labels:
    """The labels [N] that training may see, -1 for hidden or missing ones.

    The choice depends on the seed and the samples' keys, not on the packing. A larger count or fraction includes the
    labels of a smaller one. The labels of the samples `unreadable` are hidden and do not count; if labels are counted,
    other samples replace them. If all labels are visible, no key is read.

    Raises `UserError` if a list does not match the split.
    """
    readable_N = label_N.copy()
    readable_N[np.asarray(unreadable, np.int64)] = -1
    if isinstance(settings, AllLabels):
        return readable_N
    if isinstance(settings, ListedLabels):
        shown = _listed(label_N, settings.path, keys=list(keys))
    else:  # the first of each class, in an order drawn from seed and key
        labelled = np.flatnonzero(readable_N >= 0)
        salt = (seed % 2**64).to_bytes(8, "little")
        hashes = (hashlib.blake2b(key.encode(), digest_size=8, key=salt) for key in compress(keys, readable_N >= 0))
        draws = np.fromiter((int.from_bytes(each.digest(), "little") for each in hashes), np.uint64, len(labelled))
        ordered = labelled[np.lexsort((draws, readable_N[labelled]))]
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
    not_in_split = "are not in the training split (data.train)"
    for wrong, reason in ((set(unknown), not_in_split), (without_label, "have no label")):
        if wrong:
            named = ", ".join(map(repr, sorted(wrong)[:3]))
            raise UserError(
                f"data.labels.path={path}: {len(wrong)} of the listed keys {reason}, such as {named}: remove them"
            )
    if not shown:
        raise UserError(f"data.labels.path={path} lists no key: list one key a line, or remove data.labels")
    return np.array(shown, np.int64)
