import shutil

import cv2
import numpy as np
import pytest
from pydantic import ValidationError

from dpkd.data.shards import Dataset
from dpkd.errors import UserError
from dpkd.priors.base import ImageViews
from dpkd.priors.catalogue.edge import Edge
from dpkd.priors.catalogue.regions import Expert
from dpkd.priors.record import store_map
from dpkd.priors.store import PriorSet
from tests.prior_cases import draw_images, pack_folder, prepare_all

RGB_HWC = np.zeros((40, 32, 3), np.uint8)


def png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image)[1].tobytes()


def disc(value: int, dtype: type = np.uint8) -> np.ndarray:
    y_HW, x_HW = np.mgrid[:40, :32]
    return ((x_HW - 16) ** 2 + (y_HW - 20) ** 2 < 81).astype(dtype) * dtype(value)


@pytest.mark.parametrize("value", [1, 255])
def test_a_mask_becomes_the_share_of_figure_in_each_cell_whatever_its_value(value):
    map_HWC = Expert(of="mask").map(ImageViews(RGB_HWC, given={"mask": png(disc(value))}))
    np.testing.assert_allclose(map_HWC[:, :, 0], disc(1).reshape(10, 4, 8, 4).mean((1, 3)), atol=1e-6)


@pytest.mark.parametrize(("dtype", "value"), [(np.uint8, 51), (np.uint16, 13107)])
def test_amounts_are_shares_of_the_largest_value_that_the_file_can_hold(dtype, value):
    map_HWC = Expert(of="vessel", values="amount").map(ImageViews(RGB_HWC, given={"vessel": png(disc(value, dtype))}))
    assert map_HWC.max() == pytest.approx(0.2)


def test_what_was_not_given_is_not_known_and_takes_no_bytes():
    stored = store_map(Expert(of="vessel"), Expert(of="vessel").map(ImageViews(RGB_HWC)))
    assert (stored.codec, stored.data) == ("absent", b"")
    assert np.isnan(stored.decode()).all()
    assert stored.decode().shape == (1, 1, 1)


def test_a_map_of_another_size_in_colour_or_no_image_is_refused_with_its_name():
    for data, reason in (
        (png(disc(1)[:20]), r"\(20, 32\)"),
        (png(RGB_HWC), "3 channels"),
        (b"x", "is not a readable JPEG, PNG"),
    ):
        with pytest.raises(ValueError, match=f"'vessel'.*{reason}"):
            Expert(of="vessel").map(ImageViews(RGB_HWC, given={"vessel": data}))
    with pytest.raises(ValidationError, match="of"):
        Expert(of="../x")


@pytest.fixture
def folder(tmp_path):
    """Fifteen images, a mask beside each disc, a vessel beside one of them."""
    images = draw_images(tmp_path / "images")
    for path in sorted(images.glob("*/disc/*.png")):
        path.with_suffix(".mask.png").write_bytes(png(disc(255)))
    (images / "train/disc/0.expert-vessel.png").write_bytes(png(disc(255)))
    return images


PRIORS = (Edge(), Expert(of="mask"), Expert(of="vessel"))


def maps_of(dataset: Dataset) -> dict[str, dict[str, np.ndarray]]:
    found = {}
    for name in dataset.manifest.splits:
        split, maps = dataset.split(name), PriorSet.open(dataset.url, "default").split(name)
        found |= {split.keys[i]: maps.read(i, split.read(i)) for i in range(split.num_samples)}
    return found


def test_expert_maps_stand_in_the_prior_set_where_they_were_given(folder, tmp_path):
    dataset = pack_folder(folder, tmp_path / "shards")
    assert dataset.given() == {"mask": 9, "vessel": 1}
    prepare_all(dataset, priors=PRIORS)
    for key, maps in maps_of(dataset).items():
        assert np.isnan(maps["expert-mask"]).all() == ("disc" not in key)
        assert np.isnan(maps["expert-vessel"]).all() == (key != "train/disc/0")
    assert maps_of(dataset)["train/disc/0"]["expert-vessel"].mean() == pytest.approx(disc(1).mean(), abs=0.01)


def test_a_mask_that_changes_makes_the_maps_of_its_sample_anew_and_no_others(folder, tmp_path):
    dataset = pack_folder(folder, tmp_path / "before")
    prepare_all(dataset, priors=PRIORS)
    before = maps_of(dataset)
    (folder / "train/disc/1.mask.png").write_bytes(png(np.full((40, 32), 255, np.uint8)))
    changed = pack_folder(folder, tmp_path / "after")
    shutil.copytree(tmp_path / "before/priors", tmp_path / "after/priors")
    prepare_all(changed, priors=PRIORS)
    after = maps_of(changed)
    masks = {key: (before[key]["expert-mask"], after[key]["expert-mask"]) for key in after}
    other = [key for key, (old, new) in masks.items() if not np.array_equal(old, new, equal_nan=True)]
    assert other == ["train/disc/1"]
    assert after["train/disc/1"]["expert-mask"].min() > 0.95


def test_a_map_that_no_sample_has_is_refused_with_those_that_are_given(folder, tmp_path):
    dataset = pack_folder(folder, tmp_path / "shards")
    with pytest.raises(UserError, match=r"'nucleus'.*mask \(9 samples\), vessel \(1 samples\).*expert-N\.png"):
        prepare_all(dataset, priors=(Expert(of="nucleus"),))
