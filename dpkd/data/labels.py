"""The labels of a split: their file, and the choice of those that training sees.

`<split>.labels.npy` has the labels of all samples; the processes of a machine map it into memory. The choice is
deterministic, to measure label efficiency. Axes: N sample, K class.
"""

import hashlib
import io
import os
from collections.abc import Iterable, Sequence
from itertools import compress

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from dpkd.data.settings import AllLabels, LabelsPerClass, ListedLabels, VisibleLabels
from dpkd.data.text import match_lines, read_lines
from dpkd.errors import UserError
from dpkd.io import storage
from dpkd.io.shard_cache import open_shard

LABELS_ENDING = ".labels.npy"

Labels = NDArray[np.signedinteger]


class FileInfo(BaseModel):
    """One file with values of all samples of a split."""

    model_config = ConfigDict(frozen=True)
    name: str = Field(pattern=r"^\w[\w.-]*\.npy$")
    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


def write_labels(url: str, split: str, label: Labels, *, num_classes: int) -> FileInfo:
    """Writes the labels of a split, N or NK, into the data set at `url`."""
    file, name = io.BytesIO(), f"{split}{LABELS_ENDING}"
    narrow = "<i1" if label.ndim == 2 else "<i2" if num_classes < 2**15 else "<i4"
    np.lib.format.write_array(file, label.astype(narrow), version=(1, 0))
    storage.write_bytes_atomic(storage.join(url, name), file.getvalue())
    return FileInfo(name=name, size_bytes=file.tell(), sha256=storage.digest(file.getvalue()))


def read_labels(url: str, info: FileInfo, *, shape: tuple[int, ...]) -> Labels:
    """The labels, read only, in memory that processes share; raises `ValueError` for another file than `info` lists.

    A missing file raises one of `NO_FILE`.
    """
    with os.fdopen(open_shard(url, size_bytes=info.size_bytes, sha256_hex=info.sha256), "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != info.sha256:
            raise ValueError("its checksum differs from the one in dataset.json")
        file.seek(0)
        np.lib.format.read_magic(file)
        found, _, dtype = np.lib.format.read_array_header_1_0(file)
        if found != shape or dtype.kind != "i":
            raise ValueError(f"it has {found} values of {dtype}, not labels of the shape {shape}")
        return np.asarray(np.memmap(file, dtype, "r", file.tell(), shape))


def label_known(label: Labels) -> Labels:
    """Of labels NK, 0 for each sample with a known one, else -1; labels N as they are."""
    return label if label.ndim == 1 else np.where((label >= 0).any(1), 0, -1).astype(np.int8)


def class_counts(label: Labels, num_classes: int) -> list[int]:
    """The number of samples of each class (label N), or with each label (label NK)."""
    if label.ndim == 2:
        return (label == 1).sum(0).tolist()
    counts = np.zeros(num_classes, np.int64)
    for part_N in np.array_split(label, 1 + len(label) // (1 << 20)):  # bincount copies as int64
        counts += np.bincount(part_N[part_N >= 0], minlength=num_classes)
    return counts.tolist()


def visible_labels(
    label: Labels, settings: VisibleLabels, *, keys: Iterable[str], seed: int, unreadable: Labels | Sequence[int] = ()
) -> Labels:
    """The labels that training may see, -1 for hidden or missing ones: N, or NK where an image may have several.

    The choice depends on the seed and the samples' keys, not on the packing. A larger count or fraction includes the
    labels of a smaller one. The labels of the samples `unreadable` are hidden and do not count; if labels are counted,
    other samples replace them. If all labels are visible, no key is read. Of several labels of an image all are visible
    or none; it counts for each label that it has, and an image without any for a class of its own.

    Raises `UserError` if a list does not match the split.
    """
    readable = label.copy()
    readable[np.asarray(unreadable, np.int64)] = -1
    if isinstance(settings, AllLabels):
        return readable
    if isinstance(settings, ListedLabels):
        shown = _listed(label_known(label) >= 0, settings.path, keys=list(keys))
    else:  # the first of each class, in an order drawn from seed and key
        readable_N = label_known(readable) >= 0
        salt = (seed % 2**64).to_bytes(8, "little")
        hashes = (hashlib.blake2b(key.encode(), digest_size=8, key=salt) for key in compress(keys, readable_N))
        draw_N = np.zeros(len(label), np.uint64)
        draw_N[readable_N] = [int.from_bytes(each.digest(), "little") for each in hashes]
        if label.ndim == 2:
            members, class_of = np.nonzero(np.column_stack([readable == 1, readable_N & ~(readable == 1).any(1)]))
        else:
            members = np.flatnonzero(readable_N)
            class_of = readable[members]
        order = np.lexsort((draw_N[members], class_of))
        starts = np.flatnonzero(np.diff(class_of[order], prepend=-1))
        classes = np.split(members[order], starts[1:])
        if isinstance(settings, LabelsPerClass):
            counts = [settings.count] * len(classes)
        else:
            counts = [max(1, round(settings.fraction * len(members))) for members in classes]
        shown = np.concatenate([members[:count] for members, count in zip(classes, counts, strict=True)])
    visible = np.full_like(label, -1)
    visible[shown] = readable[shown]
    return visible


def _listed(known_N: NDArray[np.bool_], path: str, *, keys: Sequence[str]) -> NDArray[np.int64]:
    """The samples that the file lists by key, one a line."""
    numbers, unknown, _ = match_lines(read_lines(path, key="data.labels.path"), {key: i for i, key in enumerate(keys)})
    shown = sorted({number for _, number in numbers})
    without_label = {keys[i] for i in shown if not known_N[i]}
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
