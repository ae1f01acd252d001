import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from dpkd.data.images import decode_image
from dpkd.data.shards import Dataset
from dpkd.errors import UserError
from dpkd.priors.base import ImageViews
from dpkd.priors.catalogue.edge import Edge
from dpkd.priors.derived import DERIVED
from dpkd.priors.store import PriorMismatch, PriorSet
from tests.prior_cases import ALL, draw_images, pack_folder, prepare_all


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Dataset:
    """A small data set with all priors; read only."""
    folder = tmp_path_factory.mktemp("prepared")
    dataset = pack_folder(draw_images(folder / "images"), folder / "shards")
    prepare_all(dataset)
    return dataset


@pytest.fixture
def own(prepared, tmp_path) -> Dataset:
    """A copy of it that the test may damage."""
    return Dataset.open(shutil.copytree(prepared.url, tmp_path / "shards").as_posix())


def test_every_sample_has_the_maps_of_its_own_image(prepared):
    prior_set = PriorSet.open(prepared.url, "default")
    stored = {"edge": 1, "saliency": 1, "superpixel": 1, "hog": 9}
    assert prior_set.channels == stored | {"foreground": 1, "boundary_distance": 1}
    for name, num_samples in (("train", 12), ("test", 3)):
        images, maps = prepared.split(name), prior_set.split(name)
        for i in range(num_samples):
            sample = images.read(i)
            served = maps.read(i, sample)
            assert list(served) == [prior.kind for prior in ALL]
            for prior in ALL:
                expected_HWC = prior.map(ImageViews(decode_image(sample.image)))
                assert np.abs(served[prior.kind] - expected_HWC).mean() <= (0 if prior.nearest else 0.03)


def test_maps_know_how_to_be_resampled_and_mirrored(prepared):
    maps = PriorSet.open(prepared.url, "default").split("train")
    assert [maps.nearest(prior.kind) for prior in ALL] == [False, False, True, False]
    served = maps.read(0, prepared.split("train").read(0))
    for prior in ALL:
        np.testing.assert_array_equal(maps.flip(prior.kind, served[prior.kind]), prior.flip(served[prior.kind]))


def test_only_the_maps_asked_for_are_served_and_derived_ones_are_made_of_their_own_sample(prepared):
    split, maps = prepared.split("train"), PriorSet.open(prepared.url, "default").split("train")
    few = pickle.loads(pickle.dumps(maps.only(["foreground", "edge"])))
    for i in (0, 7):
        sample = split.read(i)
        whole, served = maps.read(i, sample), few.read(i, sample)
        assert set(served) == {"foreground", "edge"}
        np.testing.assert_array_equal(served["edge"], whole["edge"])
        np.testing.assert_array_equal(served["foreground"], DERIVED["foreground"].derive(whole))
    assert not few.nearest("foreground")
    np.testing.assert_array_equal(few.flip("foreground", served["foreground"]), served["foreground"][:, ::-1])


def test_a_map_that_is_not_in_the_set_is_refused_with_those_that_are(prepared):
    with pytest.raises(UserError, match="no map 'ridge'; it has: edge, saliency, superpixel, hog, foreground, bound"):
        PriorSet.open(prepared.url, "default").split("train").only(["ridge"])


def test_a_split_goes_to_a_loader_process_and_reads_there(prepared):
    maps = PriorSet.open(prepared.url, "default").split("train")
    sample = prepared.split("train").read(11)
    before = maps.read(11, sample)
    size = len(pickle.dumps(maps))
    after = pickle.loads(pickle.dumps(maps)).read(11, sample)
    assert size < 2000
    for name, map_HWC in before.items():
        np.testing.assert_array_equal(after[name], map_HWC)


def test_the_maps_of_another_sample_or_of_another_image_are_not_served(prepared):
    images, maps = prepared.split("train"), PriorSet.open(prepared.url, "default").split("train")
    own, other = images.read(0), images.read(1)
    with pytest.raises(PriorMismatch, match=f"they belong to '{own.key}'"):
        maps.read(0, other)
    with pytest.raises(PriorMismatch, match=r"another image.*run the prepare stage again"):
        maps.read(0, own._replace(image=other.image))


def test_damaged_maps_are_not_served_and_name_shard_and_sample(own):
    tar = Path(own.url) / "priors/default/train-000001.tar"
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    images, maps = own.split("train"), PriorSet.open(own.url, "default").split("train")
    with pytest.raises(PriorMismatch, match=r"train-000001.tar.*'train/[a-z]+/\d'.*checksum"):
        maps.read(5, images.read(5))
    maps.read(6, images.read(6))
    tar.write_bytes(data[:700])
    with pytest.raises(PriorMismatch, match=r"train-000001\.tar"):
        maps.read(6, images.read(6))


def test_a_set_that_is_missing_unfinished_or_made_from_other_images_is_not_opened(own, tmp_path):
    with pytest.raises(UserError, match=r"priors/other.*prepare"):
        PriorSet.open(own.url, "other")
    others = pack_folder(draw_images(tmp_path / "others", seed=1), tmp_path / "other-shards")
    shutil.copytree(Path(own.url) / "priors", Path(others.url) / "priors")
    with pytest.raises(UserError, match=r"other images.*prepare"):
        PriorSet.open(others.url, "default")
    (Path(own.url) / "priors/default/priors.json").write_text("{")
    with pytest.raises(UserError, match=r"priors\.json.*prepare"):
        PriorSet.open(own.url, "default")


def test_shards_of_another_preparation_are_not_served_under_an_old_manifest(own):
    old = (Path(own.url) / "priors/default/priors.json").read_bytes()
    prepare_all(own, priors=(Edge(stride=4),))
    (Path(own.url) / "priors/default/priors.json").write_bytes(old)
    with pytest.raises(
        PriorMismatch, match=r"the index .*\.index\.msgpack belongs to another shard than priors\.json lists"
    ):
        PriorSet.open(own.url, "default").split("train").read(0, own.split("train").read(0))


def test_an_unknown_split_names_those_there_are(prepared):
    with pytest.raises(UserError, match=r"no split 'val'; it has: .*train"):
        PriorSet.open(prepared.url, "default").split("val")
