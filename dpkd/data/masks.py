"""Masks of classes of pixels: what their values mean, and which of them training sees. Axes: H W pixels, N samples."""

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from dpkd.data.labels import Labels, visible_labels
from dpkd.data.settings import CountedLabels, LabelsPerClass, MaskFormat, MaskSettings
from dpkd.data.shards import MASK_EXTENSION, Split


def classes_of(mask_HW: NDArray[np.uint8 | np.uint16], masks: MaskFormat) -> NDArray[np.int16]:
    """The class of each pixel, -1 for one without a class; raises `ValueError` for a value that means no class."""
    if masks.kind != "classes":
        return (mask_HW > 0).astype(np.int16)
    class_of = np.full(1 << 16, -2, np.int16)
    class_of[: len(masks.classes)] = np.arange(len(masks.classes))
    if masks.ignore is not None:
        class_of[masks.ignore] = -1
    class_HW = class_of[mask_HW]
    if (class_HW == -2).any():
        values = ", ".join(map(str, np.unique(mask_HW[class_HW == -2])[:5]))
        raise ValueError(
            f"the mask has the value {values}, and data.masks names the classes 0 to {len(masks.classes) - 1}"
        )
    return class_HW


def masked_samples(split: Split, *, unusable: Collection[str] = ()) -> NDArray[np.bool_]:
    """Whether each sample [N] of a split has a mask, except those whose keys are `unusable`."""
    parts = [np.zeros(0, bool)]
    for index in split.indexes():
        offset_N = index.members.get(MASK_EXTENSION, (np.full(len(index.keys), -1), None))[0]
        parts.append((offset_N >= 0) & np.array([key not in unusable for key in index.keys], bool))
    return np.concatenate(parts)


def visible_masks(
    split: Split, masks: MaskSettings, *, seed: int, unreadable: Labels | Sequence[int], unusable: Collection[str]
) -> Labels:
    """0 for each sample [N] whose mask training may see, and -1 for the others; chosen as labels are."""
    mask_N = masked_samples(split, unusable=unusable).astype(np.int8) - np.int8(1)
    shown = masks.visible
    counted = LabelsPerClass(count=shown.count) if isinstance(shown, CountedLabels) else shown
    return visible_labels(mask_N, counted, keys=split.iter_keys(), seed=seed, unreadable=unreadable)
