"""The labels of a split in one file, `<split>.labels.npy`, which the processes of a machine map into memory."""

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


def write_labels(url: str, split: str, label_N: Labels, *, num_classes: int) -> FileInfo:
    """Writes the labels of a split into the data set at `url`."""
    file, name = io.BytesIO(), f"{split}{LABELS_ENDING}"
    narrow = label_N.astype("<i2" if num_classes < 2**15 else "<i4")
    np.lib.format.write_array(file, narrow, version=(1, 0))
    storage.write_bytes_atomic(storage.join(url, name), file.getvalue())
    return FileInfo(name=name, size_bytes=file.tell(), sha256=storage.digest(file.getvalue()))


def read_labels(url: str, info: FileInfo, *, num_samples: int) -> Labels:
    """The labels, read only, in memory that processes share; raises `ValueError` for another file than `info` lists.

    A missing file raises one of `NO_FILE`.
    """
    with os.fdopen(open_shard(url, size_bytes=info.size_bytes, sha256_hex=info.sha256), "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != info.sha256:
            raise ValueError("its checksum differs from the one in dataset.json")
        file.seek(0)
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if shape != (num_samples,) or dtype.kind != "i":
            raise ValueError(f"it has {shape} values of {dtype}, not {num_samples} labels")
        return np.asarray(np.memmap(file, dtype, "r", file.tell(), shape))
