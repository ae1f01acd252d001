"""Measures CPU time an image of the loader beside other loaders on the same JPEG files, in turns in one process.

    python -m tools.bench_loader                           drawn images
    python -m tools.bench_loader --data FOLDER --json      the images below FOLDER; the result as JSON

A case WxH:size is files of W x H pixels (quality 90) and views of one size, uint8 batches of 64: a resized crop of 0.35
to 1, flip, brightness, contrast and saturation of 0.4. WxH:several makes 2 views of 224 and 6 of 96 pixels of each
image. Each case is measured with one worker process as each loader starts it, without variables of threads, and without
worker, with one thread. The figures are user and system time of the training process and the loader's workers, and the
ratio to dpkd with two priors in the same turn: medians over the turns. A loader that is not installed is a row that
says so.
"""

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import psutil  # type: ignore[import-untyped]
import torch
from PIL import Image
from torchvision import io as torchvision_io
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from dpkd.backends.local_pool import LocalPool
from dpkd.data.order import Order
from dpkd.data.settings import GLOBAL, AugmentSettings, FolderSource, LoaderSettings
from dpkd.data.shards import Dataset
from dpkd.data.stream import ViewPlan, load_batches
from dpkd.launch.forking import ONE_THREAD
from dpkd.log import logger
from dpkd.priors import DEFAULT_PRIORS
from dpkd.priors.store import PriorSet
from dpkd.report.quarantine import Quarantine
from dpkd.settings import DataSettings, PrepareSettings
from dpkd.stages.pack import pack
from dpkd.stages.prepare import prepare
from tools.make_sample_data import SampleSettings, draw_samples

CASES = ("256x256:224", "480x320:224", "256x256:84", "480x320:several")
BATCH, BATCHES_A_TURN = 64, 2
GLOBAL_SIZE, LOCAL_SIZE = 224, 96
RATIO, SCALE, LOCAL_SCALE = (0.75, 1.3333), (0.35, 1.0), (0.05, 0.35)
REFERENCE = "dpkd, edge and saliency"


class Case(NamedTuple):
    """Files and the views of them."""

    folder: Path
    size: int
    several: bool
    workers: int

    @property
    def files(self) -> list[Path]:
        """The JPEG files."""
        return sorted((self.folder / "files" / "train").rglob("*.jpg"))


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Prepares the files, measures each case in processes of their own, and prints the result; returns it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of JPEG files; none draws them")
    parser.add_argument("--cases", nargs="+", default=CASES, help="WxH:size, or WxH:several")
    parser.add_argument("--loaders", nargs="+", default=[""], help="beginnings of rows; all by default")
    parser.add_argument("--images", type=int, default=600, help="files of each size; images repeat")
    parser.add_argument("--turns", type=int, default=9, help=f"turns of {BATCHES_A_TURN} batches of each loader")
    parser.add_argument("--workers", type=int, nargs="+", default=(1, 0), help="numbers of workers to measure")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--folder", type=Path, help="keeps the prepared files; used again if it exists")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        result = _measure(options)
        print(json.dumps(result))
        return result
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    result = {
        "command": "python -m tools.bench_loader " + " ".join(sys.argv[1:] if arguments is None else arguments),
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores seen, load {os.getloadavg()[0]:.1f}",
        "cases": {},
    }
    with tempfile.TemporaryDirectory() as name:
        for case, workers in itertools.product(options.cases, options.workers):
            folder = (options.folder or Path(name)) / case.partition(":")[0]
            _prepare(folder, data=options.data, num_images=options.images)
            numbers = f"--turns {options.turns} --workers {workers}".split()
            environment = {key: value for key, value in os.environ.items() if key not in ONE_THREAD}
            command = [sys.executable, "-m", "tools.bench_loader", "--measure", "--folder", str(folder), *numbers]
            printed = subprocess.run(
                [*command, "--cases", case, "--loaders", *options.loaders],
                env=environment | ({} if workers else ONE_THREAD),
                stdout=subprocess.PIPE,
                check=True,
            ).stdout
            column = "one worker, as shipped" if workers else "no worker, one thread"
            result["cases"][f"{case}, {column}"] = json.loads(printed.splitlines()[-1])
    print(json.dumps(result, indent=1) if options.json else _table(result))
    return result


def _table(result: dict[str, Any]) -> str:
    lines = [f"{result['command']}, commit {result['commit']}, {result['date']}, {result['machine']}"]
    for case, rows in result["cases"].items():
        lines += ["", f"| {case} | us an image | over {REFERENCE} |", "|---|---|---|"]
        lines += [f"| {name} | {row['us']} | {row['ratio']} |" for name, row in rows.items()]
    return "\n".join(lines)


def _prepare(folder: Path, *, data: Path | None, num_images: int) -> None:
    """Makes <folder>/{files,shards} if they are missing: files of the size that is the folder's name, and priors."""
    if (folder / "shards" / "priors" / "bench" / "priors.json").exists():
        return
    width, height = map(int, folder.name.split("x"))
    if data is None:
        data = folder / "drawn"
        draw_samples(data, settings=SampleSettings(size=max(width, height), largest=20), seed=0)
    paths = [path for path in sorted(data.rglob("*.jpg")) if "_" not in path.stem]
    for i, path in zip(range(num_images), itertools.cycle(paths), strict=False):
        image_HWC: Any = cv2.imread(str(path))
        if (image_HWC.shape[0] > image_HWC.shape[1]) != (height > width):
            image_HWC = image_HWC.swapaxes(0, 1)
        scale = min(image_HWC.shape[0] / height, image_HWC.shape[1] / width)
        cut_HWC = np.ascontiguousarray(image_HWC[: round(scale * height), : round(scale * width)])
        file = folder / "files" / "train" / f"class{i % 10}" / f"{i:06d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        resized_HWC = cv2.resize(cut_HWC, (width, height), interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(file), resized_HWC, (cv2.IMWRITE_JPEG_QUALITY, 90))
    settings = DataSettings(source=FolderSource(path=str(folder / "files")), samples_per_shard=100)
    common: Any = {
        "pool": LocalPool(1),
        "quarantine": Quarantine(folder / "quarantine.jsonl", limit=0),
        "progress": lambda *_: None,
    }
    dataset = pack(settings, str(folder / "shards"), seed=0, **common)
    prepare(dataset, PrepareSettings(name="bench", priors=DEFAULT_PRIORS), **common)


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    """Microseconds an image and the ratio of each loader, in this process."""
    size, (workers,) = options.cases[0].partition(":")[2], options.workers
    case = Case(options.folder, GLOBAL_SIZE if size == "several" else int(size), size == "several", workers)
    if not workers:
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
    names = [name for name in LOADERS if name == REFERENCE or name.startswith(tuple(options.loaders))]
    if case.several:
        names = [name for name in names if name in SEVERAL]
    rows: dict[str, Any] = dict.fromkeys(names)
    running: dict[str, tuple[Iterator[Any], list[psutil.Process]]] = {}
    this = psutil.Process()
    for name in names:
        before = set(this.children(recursive=True))
        try:
            batches = LOADERS[name](case)
            next(batches)
        except ImportError as error:
            rows[name] = {"us": str(error), "ratio": ""}
            continue
        running[name] = (batches, [child for child in this.children(recursive=True) if child not in before])
    own_s: dict[str, list[float]] = {name: [] for name in running}
    workers_s: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(options.turns + 1):
        for name, (batches, processes) in running.items():
            # workers fill their queue again after a turn, so their time counts from turn to turn
            workers_s[name].append(sum(sum(process.cpu_times()[:2]) for process in processes))
            start_s = time.process_time()
            for _ in range(BATCHES_A_TURN):
                next(batches)
            own_s[name].append(time.process_time() - start_s)
    us_of = {name: (np.diff(workers_s[name]) + own_s[name][:-1]) / (BATCH * BATCHES_A_TURN) * 1e6 for name in running}
    for name, us in us_of.items():
        ratio = statistics.median(us / us_of[REFERENCE])
        rows[name] = {"us": round(statistics.median(us)), "ratio": round(float(ratio), 3)}
    return rows


def _dpkd(case: Case, *, priors: tuple[str, ...], cache_gb: float = 0.0) -> Iterator[Any]:
    dataset = Dataset.open(str(case.folder / "shards"))
    split = dataset.split("train")
    order = Order(split.shard_sizes, seed=0, global_batch_size=BATCH, block_shards=8)
    views = {GLOBAL: ViewPlan(case.size, case.size // 4, AugmentSettings(), count=2 if case.several else 1)}
    if case.several:
        views["local"] = ViewPlan(LOCAL_SIZE, LOCAL_SIZE // 4, AugmentSettings(crop_scale=LOCAL_SCALE), count=6)
    batches = load_batches(
        split,
        ((order.batch(step), order.epochs_of(step)) for step in itertools.count()),
        targets={"class": split.label_N},
        maps=PriorSet.open(dataset.url, "bench").split("train").only(priors) if priors else None,
        views=views,
        seed=0,
        loader=LoaderSettings(workers=case.workers, cache_gb=cache_gb),
    )
    return itertools.islice(batches, split.num_samples // BATCH if cache_gb else 0, None)


def _views(case: Case) -> Callable[[Any], Any]:
    """The views of torchvision of an image as uint8 tensors; a list if there are several."""

    def view(size: int, scale: tuple[float, float]) -> Callable[[Any], Any]:
        crop = v2.RandomResizedCrop(size, scale=scale, ratio=RATIO, antialias=True)
        jitter = v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4)
        return v2.Compose([crop, v2.RandomHorizontalFlip(), jitter, v2.ToImage()])

    if not case.several:
        return view(case.size, SCALE)
    views = 2 * [view(case.size, SCALE)] + 6 * [view(LOCAL_SIZE, LOCAL_SCALE)]
    return lambda image: [make(image) for make in views]


def _batches(dataset: Any, case: Case, *, shuffle: bool = True) -> Iterator[Any]:
    options: Any = {"num_workers": case.workers, "persistent_workers": case.workers > 0}
    loader = torch.utils.data.DataLoader(dataset, BATCH, shuffle=shuffle, drop_last=True, **options)
    return itertools.chain.from_iterable(itertools.repeat(loader))


class _Items(torch.utils.data.Dataset[Any]):
    """`make` of each item."""

    def __init__(self, items: Any, make: Callable[[Any], Any]) -> None:
        self.items, self.make = items, make

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        return self.make(self.items[i])


def _webdataset(case: Case, *, decode: str | None) -> Iterator[Any]:
    webdataset: Any = import_module("webdataset")

    views = _views(case)

    def from_bytes(data: bytes) -> Any:
        tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return views(torchvision_io.decode_jpeg(tensor, mode=torchvision_io.ImageReadMode.RGB))

    urls = [str(path) for path in sorted((case.folder / "shards").glob("*.tar"))]
    dataset = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(256)
    dataset = dataset.decode(decode) if decode else dataset
    return _batches(dataset.to_tuple("jpg").map_tuple(views if decode else from_bytes), case, shuffle=False)


def _jpeg(path: Path) -> dict[str, Any]:
    return {"image": Image.open(path)}


def _litdata(case: Case) -> Iterator[Any]:
    litdata: Any = import_module("litdata")

    views, folder = _views(case), case.folder / "litdata"
    if not (folder / "index.json").exists():
        litdata.optimize(_jpeg, case.files, str(folder), chunk_bytes="16MB", num_workers=1, start_method="fork")
    dataset = litdata.StreamingDataset(str(folder), shuffle=True, transform=lambda item: views(item["image"]))
    options = {"num_workers": case.workers, "persistent_workers": case.workers > 0, "drop_last": True}
    loader = litdata.StreamingDataLoader(dataset, batch_size=BATCH, **options)
    return itertools.chain.from_iterable(itertools.repeat(loader))


def _mosaic(case: Case) -> Iterator[Any]:
    streaming: Any = import_module("streaming")

    views, folder = _views(case), case.folder / "mosaic"
    if not (folder / "index.json").exists():
        with streaming.MDSWriter(out=str(folder), columns={"image": "jpeg"}) as writer:
            for path in case.files:
                writer.write(_jpeg(path))
    dataset = streaming.StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH)
    return _batches(_Items(dataset, lambda item: views(item["image"])), case)


def _image_folder(case: Case, *, options: dict[str, Any]) -> Iterator[Any]:
    return _batches(ImageFolder(str(case.folder / "files" / "train"), _views(case), **options), case)


def _opencv(case: Case) -> Iterator[Any]:
    return _batches(_Items(case.files, lambda path: _opencv_view(_decoded(path), size=case.size)), case)


def _opencv_decoded(case: Case) -> Iterator[Any]:
    images = [_decoded(path) for path in case.files]
    return _batches(_Items(images, partial(_opencv_view, size=case.size)), case)


def _decoded(path: Path) -> Any:
    return cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR_RGB)


def _opencv_view(image_HWC: Any, *, size: int) -> torch.Tensor:
    """An image cropped, resized, coloured and flipped by OpenCV alone."""
    rows, columns = image_HWC.shape[:2]
    height, width = rows + 1, columns
    while height > rows or width > columns:
        area, ratio = random.uniform(*SCALE) * rows * columns, np.exp(random.uniform(*np.log(RATIO)))
        height, width = round((area / ratio) ** 0.5), round((area * ratio) ** 0.5)
    y, x = random.randint(0, rows - height), random.randint(0, columns - width)
    kernel = cv2.INTER_AREA if height >= size and width >= size else cv2.INTER_LINEAR
    view_HWC = cv2.resize(image_HWC[y : y + height, x : x + width], (size, size), interpolation=kernel)
    brightness, contrast, saturation = (random.uniform(0.6, 1.4) for _ in range(3))
    grey, matrix = np.array([0.299, 0.587, 0.114]), np.empty((3, 4))
    matrix[:, :3] = brightness * contrast * (saturation * np.eye(3) + (1 - saturation) * grey)
    matrix[:, 3] = brightness * (1 - contrast) * (grey @ cv2.mean(view_HWC)[:3])
    view_HWC = cv2.transform(view_HWC, matrix)
    view_HWC = cv2.flip(view_HWC, 1) if random.random() < 0.5 else view_HWC
    view_CHW = torch.empty(3, size, size, dtype=torch.uint8)
    cv2.split(view_HWC, list(view_CHW.numpy()))
    return view_CHW


ALL = tuple(prior.name for prior in DEFAULT_PRIORS)
LOADERS: dict[str, Callable[[Case], Iterator[Any]]] = {
    REFERENCE: partial(_dpkd, priors=("edge", "saliency")),
    "dpkd, all default priors": partial(_dpkd, priors=ALL),
    "dpkd, no priors": partial(_dpkd, priors=()),
    "dpkd, no priors, kept images": partial(_dpkd, priors=(), cache_gb=1.0),
    "webdataset, decode pil": partial(_webdataset, decode="pil"),
    "webdataset, decode torchrgb8": partial(_webdataset, decode="torchrgb8"),
    "webdataset, decode_jpeg": partial(_webdataset, decode=None),
    "litdata": _litdata,
    "mosaicml-streaming": _mosaic,
    "ImageFolder, PIL": partial(_image_folder, options={}),
    "ImageFolder, decode_jpeg": partial(
        _image_folder, options={"loader": partial(torchvision_io.decode_image, mode="RGB")}
    ),
    "OpenCV alone": _opencv,
    "OpenCV alone, decoded images": _opencv_decoded,
}
SEVERAL = (REFERENCE, "dpkd, all default priors", "dpkd, no priors", "ImageFolder, PIL", "ImageFolder, decode_jpeg")


if __name__ == "__main__":
    logger.setLevel("WARNING")  # the result alone goes to stdout
    main()
