"""A prior of another package is named in the settings by its class, and prepared like those that dpkd has."""

from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from dpkd.data.shards import Dataset
from dpkd.errors import UserError
from dpkd.priors.base import ImageViews, PriorConfig
from dpkd.priors.codecs import JpegCodec, Map
from dpkd.priors.store import PriorSet
from dpkd.settings import Settings, parse_settings
from tests.prior_cases import draw_images, pack_folder, prepare_all


class Warmth(PriorConfig):
    """How much redder than blue each eighth pixel is."""

    kind: str = f"{__name__}:Warmth"
    gain: float = 1.0
    channels: ClassVar[int] = 1
    codec: ClassVar[JpegCodec] = JpegCodec()

    def map(self, image: ImageViews) -> Map:
        rgb_HWC = image.rgb_HWC[::8, ::8].astype(np.float32) / 255
        return np.clip(0.5 + self.gain * (rgb_HWC[:, :, :1] - rgb_HWC[:, :, 2:]) / 2, 0, 1)


class Batched(Warmth):
    """The opposite, of up to four images at a time."""

    kind: str = f"{__name__}:Batched"
    batch_size: int = 4
    device: ClassVar[str] = "accelerator"

    def sealed(self) -> "Batched":
        return self

    def identity(self) -> str:
        return self.model_dump_json(exclude={"batch_size"})

    def maps(self, images: list[ImageViews], *, device: str) -> list[Map]:
        assert len(images) <= 4
        return [1 - self.map(image) for image in images]


class WithoutMap(PriorConfig):
    kind: str = f"{__name__}:WithoutMap"
    channels: ClassVar[int] = 1
    codec: ClassVar[JpegCodec] = JpegCodec()


class WithoutSeal(Warmth):
    kind: str = f"{__name__}:WithoutSeal"
    maps = Batched.maps


def settings_with(*priors: dict) -> Settings:
    student = {"model": "resnet18", "objectives": [{"kind": "supervised"}]}
    tree = {"prepare": {"priors": list(priors)}, "data": {"source": "x"}, "distill": {"students": {"s": student}}}
    return parse_settings(tree, origin="test")


def maps_of(dataset: Dataset, settings: Settings) -> dict[str, Map]:
    """The maps of the first sample, read from the set that was prepared."""
    prepare_all(dataset, priors=settings.prepare.chosen)
    split = dataset.split("train")
    return PriorSet.open(dataset.url, "default").split("train").read(0, split.read(0))


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return pack_folder(draw_images(tmp_path / "images"), str(tmp_path / "shards"))


def test_a_prior_of_another_package_is_prepared_and_read_back(dataset: Dataset) -> None:
    settings = settings_with({"kind": "edge"}, {"kind": f"{__name__}:Warmth", "gain": 0.5})
    maps = maps_of(dataset, settings)
    assert {name: map_HWC.shape for name, map_HWC in maps.items()} == {"edge": (20, 16, 1), "warmth": (5, 4, 1)}
    again = parse_settings(settings.model_dump(mode="json"), origin="again")
    assert again.prepare.chosen == settings.prepare.chosen


def test_one_that_takes_batches_of_images_is_prepared_too(dataset: Dataset) -> None:
    one = maps_of(dataset, settings_with({"kind": f"{__name__}:Warmth"}))["warmth"]
    many = maps_of(dataset, settings_with({"kind": f"{__name__}:Batched"}))["batched"]
    assert many == pytest.approx(1 - one, abs=0.02)


@pytest.mark.parametrize(
    ("prior", "words"),
    [
        ({"kind": "no_such_package:Warmth"}, ["prepare.priors.0", "no_such_package", "package.module:Class"]),
        ({"kind": f"{__name__}:Cold"}, ["prepare.priors.0", "Cold", "package.module:Class"]),
        ({"kind": f"{__name__}:Path"}, ["prepare.priors.0", "no subclass of dpkd.priors.base.PriorConfig"]),
        ({"kind": f"{__name__}:Warmth", "gane": 1}, ["prepare.priors.0", "gane"]),
        ({"kind": f"{__name__}:WithoutMap"}, ["prepare.priors.0", "lacks map"]),
        ({"kind": f"{__name__}:WithoutSeal"}, ["prepare.priors.0", "lacks", "sealed"]),
    ],
)
def test_a_class_that_is_no_prior_is_named_with_what_is_wrong(prior: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        settings_with(prior)
    assert all(word in str(caught.value) for word in words), caught.value
