"""Masks of images: the meaning of their values, which of them training sees, and what is wrong with them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from dpkd.data.images import encode_png
from dpkd.data.masks import classes_of, masked_samples, visible_masks
from dpkd.data.settings import CountedLabels, MaskFormat, MaskSettings
from dpkd.data.shards import Split
from dpkd.priors.base import ImageViews
from dpkd.priors.catalogue.regions import Mask
from tests.data.packing import pack_at

CLASSES = MaskFormat(kind="classes", classes=("ground", "root", "leaf"), stride=2)


def test_values_mean_what_is_declared() -> None:
    mask_HW = np.array([[0, 1, 2], [255, 2, 0]], np.uint8)
    np.testing.assert_array_equal(classes_of(mask_HW, CLASSES), [[0, 1, 2], [-1, 2, 0]])
    for masks in (MaskFormat(kind="figure_ground"), MaskFormat(kind="instances")):
        figure_HW = classes_of(mask_HW.astype(np.uint16) * 257, masks)
        np.testing.assert_array_equal(figure_HW, [[0, 1, 1], [1, 1, 0]])
    with pytest.raises(ValueError, match=r"the value 3, 7, and data\.masks names the classes 0 to 2"):
        classes_of(np.array([[3, 7, 0]], np.uint8), CLASSES)
    with pytest.raises(ValueError, match="the value 255"):
        classes_of(mask_HW, CLASSES.model_copy(update={"ignore": None}))


def test_formats_that_declare_too_little_or_too_much_are_refused() -> None:
    with pytest.raises(ValidationError, match="needs the names of the values"):
        MaskFormat(kind="classes")
    with pytest.raises(ValidationError, match="remove classes"):
        MaskFormat(kind="instances", classes=("a", "b"))


def test_the_map_has_the_share_of_each_class_in_each_cell() -> None:
    mask_HW = np.array([[0, 0, 1, 255], [0, 1, 1, 255], [2, 2, 255, 255], [2, 2, 255, 255]], np.uint8)
    image = ImageViews(np.zeros((4, 4, 3), np.uint8), given={"mask": encode_png(mask_HW)})
    share_HWK = Mask(format=CLASSES).map(image)
    np.testing.assert_allclose(share_HWK[:, :, 0], [[0.75, 0], [0, 0]])
    np.testing.assert_allclose(share_HWK[:, :, 1], [[0.25, 0.5], [0, 0]])
    np.testing.assert_allclose(share_HWK[:, :, 2], [[0, 0], [1, 0]])
    unmasked = Mask(format=CLASSES).map(ImageViews(np.zeros((4, 4, 3), np.uint8)))
    assert unmasked.shape == (1, 1, 3)
    assert np.isnan(unmasked).all()
    for wrong, words in (
        (np.full((4, 4), 255, np.uint8), "empty"),
        (np.full((4, 4), 9, np.uint8), "value 9"),
        (np.zeros((4, 5), np.uint8), "shape"),
    ):
        with pytest.raises(ValueError, match=words):
            Mask(format=CLASSES).map(ImageViews(np.zeros((4, 4, 3), np.uint8), given={"mask": encode_png(wrong)}))


def test_the_prior_of_masks_does_not_depend_on_which_are_visible() -> None:
    few = MaskSettings(kind="instances", visible=CountedLabels(count=1), tile=64)
    assert Mask.of_format(few) == Mask.of_format(MaskSettings(kind="instances"))
    assert Mask.of_format(few) != Mask.of_format(MaskSettings(kind="instances", stride=4))


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """Twelve images; those with an even number have a mask, as figure and ground or as objects."""
    folder, rng = tmp_path_factory.mktemp("masks"), np.random.default_rng(0)
    (folder / "train").mkdir()
    for i in range(12):
        image = rng.integers(0, 255, (20, 24, 3), np.uint8)
        (folder / "train" / f"{i:02}.png").write_bytes(encode_png(image))
        if i % 2 == 0:
            ending = "mask" if i % 4 else "instances"
            objects = np.arange(480, dtype=np.uint16).reshape(20, 24) * 100
            (folder / "train" / f"{i:02}.{ending}.png").write_bytes(encode_png(objects))
    return pack_at(folder, folder.with_name("shards"), samples_per_shard=5).split("train")


def keys_of(split: Split, chosen_N: np.ndarray) -> set[str]:
    return {split.keys[i] for i in np.flatnonzero(chosen_N)}


def test_objects_are_masks_of_images_without_another(split: Split) -> None:
    masked = {key for key in split.keys if int(key[-2:]) % 2 == 0}
    assert keys_of(split, masked_samples(split)) == masked
    assert all(split.read(i).given.keys() == {"mask"} for i in np.flatnonzero(masked_samples(split)))
    lost = min(masked)
    assert keys_of(split, masked_samples(split, unusable={lost})) == masked - {lost}


def test_a_larger_number_of_visible_masks_includes_a_smaller_one(split: Split, tmp_path: Path) -> None:
    def shown(visible: dict[str, Any], *, seed: int = 0, unreadable: tuple[int, ...] = ()) -> set[str]:
        settings = MaskSettings.model_validate({"kind": "instances", "visible": visible})
        visible_N = visible_masks(split, settings, seed=seed, unreadable=unreadable, unusable=())
        return keys_of(split, visible_N >= 0)

    one, three = (shown({"kind": "count", "count": count}) for count in (1, 3))
    assert len(one) == 1
    assert len(three) == 3
    assert one < three < shown({"kind": "all"})
    assert shown({"kind": "fraction", "fraction": 0.5}) == three
    assert any(shown({"kind": "count", "count": 3}, seed=seed) != three for seed in range(1, 4))
    lost = split.keys.index(min(three))
    without = shown({"kind": "count", "count": 3}, unreadable=(lost,))  # another one takes its place
    assert len(without) == 3
    assert min(three) not in without
    (tmp_path / "keys.txt").write_text(f"{max(three)}\n")
    assert shown({"kind": "listed", "path": str(tmp_path / "keys.txt")}) == {max(three)}
