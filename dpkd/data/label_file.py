"""The labels of a split in one file, `<split>.labels.npy`, which the processes of a machine map into memory.

Axes: N sample, K class.
"""

import hashlib
import io
import os

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

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
