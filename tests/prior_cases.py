"""What the tests of prior sets share: a small packed data set, and a pool that works in this process."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np

from dpkd.data.settings import FolderSource
from dpkd.data.shards import Dataset
from dpkd.priors.catalogue.edge import Edge
from dpkd.priors.catalogue.orientation import Hog
from dpkd.priors.catalogue.regions import Superpixel
from dpkd.priors.catalogue.saliency import Saliency
from dpkd.priors.store import PriorSet
from dpkd.report.quarantine import Quarantine
from dpkd.settings import DataSettings, PrepareSettings
from dpkd.stages.pack import pack
from dpkd.stages.prepare import prepare

Item = TypeVar("Item")
Result = TypeVar("Result")

ALL = (Edge(), Saliency(), Superpixel(region_px=8), Hog())


class SerialPool:
    """Works on the items in this process, one after the other."""

    num_workers = 1

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[tuple[int, Result]]:
        for index, item in enumerate(items):
            yield index, function(item)


def draw_images(folder: Path, *, seed: int = 0) -> Path:
    """A folder `<split>/<class>/*.png` of 15 small images: 12 of the split train, 3 of test."""
    random = np.random.default_rng(seed)
    train = [f"train/{label}/{i}" for label in ("disc", "bar") for i in range(6)]
    for name in (*train, "test/disc/0", "test/disc/1", "test/disc/2"):
        image_HWC = cv2.GaussianBlur(random.uniform(0, 255, (40, 32, 3)).astype(np.float32), (0, 0), 2)
        cv2.circle(image_HWC, (16, 20), 9, tuple(random.uniform(0, 255, 3)), -1)
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), image_HWC)
    return folder


def pack_folder(folder: Path, destination: str | Path, *, samples_per_shard: int = 5) -> Dataset:
    """The packed folder: three shards of train, one of test."""
    data = DataSettings(source=FolderSource(path=str(folder)), samples_per_shard=samples_per_shard)
    report = Quarantine(folder.parent / "pack.jsonl", limit=0)
    return pack(data, str(destination), seed=0, pool=SerialPool(), quarantine=report, progress=lambda done, total: None)


def prepare_all(
    dataset: Dataset, *, priors=ALL, pool=None, accelerator=None, limit: float = 0, report: Path | None = None
) -> PriorSet:
    """The set "default" of a data set."""
    quarantine = Quarantine(report or Path(dataset.url) / "quarantine.jsonl", limit=limit)
    settings = PrepareSettings(priors=priors)
    return prepare(
        dataset,
        settings,
        pool=pool or SerialPool(),
        accelerator=accelerator,
        quarantine=quarantine,
        progress=lambda done, total: None,
    )
