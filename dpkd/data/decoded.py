"""Decoded images in memory, for training that waits for the decoding of its images again in each epoch.

Axes: N samples of the split, H and W pixels.
"""

import math
import os
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dpkd.errors import UserError

SHARED = "/dev/shm"  # noqa: S108  (where Linux keeps memory that processes share)
ENLARGE = f"enlarge {SHARED} (docker run --shm-size)"


def free_shared() -> int:
    """Free bytes of the shared memory."""
    place = os.statvfs(SHARED)
    return place.f_bavail * place.f_frsize


class DecodedImages:
    """The first decoded images of a split that fit into a number of bytes, shared by all processes that unpickle it.

    No image is replaced: in a random order, one that was dropped for another would be missed as often as it is used.
    """

    def __init__(self, num_samples: int, *, num_bytes: int, lock: AbstractContextManager[Any]) -> None:
        """Takes the memory at once, so that it cannot run out later; raises `UserError` if there is too little."""
        if num_bytes > (free := free_shared()):
            raise UserError(
                f"data.loader.cache_gb asks for {num_bytes / 1e9:.1f} GB of shared memory in each rank, and "
                f"{SHARED} has {free / 1e9:.1f} GB left: lower it, or {ENLARGE}"
            )
        storage = torch.UntypedStorage._new_shared(num_bytes)  # noqa: SLF001  (`share_memory_` copies)
        self._pixels = torch.empty(0, dtype=torch.uint8).set_(storage)
        # end of its pixels, height, width
        self._place_N3 = torch.zeros(num_samples, 3, dtype=torch.int64).share_memory_()
        self._used = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._lock = lock

    def get(self, index: int) -> NDArray[np.uint8] | None:
        """The image of a sample, HWC RGB, which must not be changed; None if it was not kept."""
        with self._lock:
            end, height, width = self._place_N3[index].tolist()
        if not end:
            return None
        return self._pixels[end - 3 * height * width : end].numpy().reshape(height, width, 3)

    def keep(self, index: int, image_HWC: NDArray[np.uint8]) -> None:
        """Keeps the image of a sample if there is room for it."""
        with self._lock:
            start, end = int(self._used), int(self._used) + math.prod(image_HWC.shape)
            if end > len(self._pixels) or self._place_N3[index, 0]:
                return
            self._used[0] = end
        self._pixels[start:end] = torch.from_numpy(np.ascontiguousarray(image_HWC).reshape(-1))
        with self._lock:
            self._place_N3[index] = torch.tensor([end, *image_HWC.shape[:2]])
