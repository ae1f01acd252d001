"""Measures what `prepare` costs: CPU milliseconds an image of the stage and of each kernel, and the bytes of each map.

    python -m tools.bench_prepare                          drawn images
    python -m tools.bench_prepare --data FOLDER            the images below FOLDER, scaled to the size measured
    python -m tools.bench_prepare --data FOLDER --against CHECKOUT

One process prepares one shard with the default priors, then runs its kernels alone (decode, the shared views of an
image, each prior's map, their encoding), round after round; medians count. With another checkout, a process of its code
takes turns with it, and the quartiles of the ratios of a round's times are given: the other's over this code's.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import cv2

from dpkd.backends.local_pool import LocalPool
from dpkd.data.images import decode_image
from dpkd.data.sample import Sample
from dpkd.data.settings import FolderSource
from dpkd.data.shards import Dataset
from dpkd.log import logger
from dpkd.priors import DEFAULT_PRIORS
from dpkd.priors.base import ImageViews, keep_freed_memory
from dpkd.priors.record import store_map
from dpkd.report.quarantine import Quarantine
from dpkd.settings import DataSettings, PrepareSettings
from dpkd.stages.pack import pack
from dpkd.stages.prepare import prepare
from tools.make_sample_data import SampleSettings, draw_samples

ROOT = Path(__file__).resolve().parents[1]
VIEWS = ("lab_HWC", "half_lab_HWC", "grey8_HW", "grey_HW")
"""The views of an image that more than one prior takes, here or in another checkout."""
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark and prints its result as JSON; returns it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of images; none draws them")
    parser.add_argument("--images", type=int, default=100, help="images of the shard; they repeat")
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--rounds", type=int, default=9, help="times that each side is measured")
    parser.add_argument("--against", metavar="CHECKOUT", help="folder of other code")
    parser.add_argument("--serve", metavar="SHARDS", help=argparse.SUPPRESS)  # one side of a comparison
    options = parser.parse_args(arguments)
    cv2.setNumThreads(1)
    if options.serve:
        return _serve(Dataset.open(options.serve))
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    result: dict[str, Any] = vars(options) | {"commit": commit.stdout.strip(), "date": time.strftime("%Y-%m-%d")}
    with tempfile.TemporaryDirectory() as name:
        dataset = _pack(_images(options, Path(name) / "drawn"), Path(name))
        folders = [ROOT, *([Path(options.against).resolve()] if options.against else [])]
        rounds = _measure(dataset, folders, rounds=options.rounds)
    result["map_bytes"] = rounds[0][0].pop("bytes")
    for kernel in rounds[0][0]:
        sides = list(zip(*[[side[kernel] for side in of_round] for of_round in rounds], strict=True))
        row = {"ms": [round(statistics.median(side), 3) for side in sides]}
        if options.against:
            ratios = [other / max(this, 1e-6) for this, other in zip(*sides, strict=True)]
            row["ratio"] = [round(ratio, 3) for ratio in statistics.quantiles(ratios, n=4)]
        result.setdefault("kernels", {})[kernel] = row
    print(json.dumps(result, indent=1))
    return result


def _images(options: argparse.Namespace, drawn: Path) -> list[bytes]:
    """JPEG files, quality 90; the images repeat until there are enough."""
    if options.data is None:
        draw_samples(drawn, settings=SampleSettings(size=options.size, largest=20), seed=0)
    folder = drawn if options.data is None else Path(options.data)
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_ENDINGS)
    paths = [path for path in paths if "_" not in path.stem and ".mask" not in path.name]
    if not paths:
        raise SystemExit(f"{folder}: no image below it; give a folder of {', '.join(IMAGE_ENDINGS)} to --data")
    files = []
    for path in paths[: options.images]:
        image_HWC = cv2.cvtColor(decode_image(path.read_bytes()), cv2.COLOR_RGB2BGR)
        square_HWC = cv2.resize(image_HWC, (options.size, options.size), interpolation=cv2.INTER_AREA)
        files.append(cv2.imencode(".jpg", square_HWC, (cv2.IMWRITE_JPEG_QUALITY, 90))[1].tobytes())
    return [files[i % len(files)] for i in range(options.images)]


def _pack(images: list[bytes], folder: Path) -> Dataset:
    """The images as one shard."""
    for i, image in enumerate(images):
        path = folder / "images" / "train" / f"class{i % 2}" / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    settings = DataSettings(source=FolderSource(path=str(folder / "images")), samples_per_shard=len(images))
    quarantine = Quarantine(folder / "quarantine.jsonl", limit=0)
    return pack(
        settings, str(folder / "shards"), seed=0, pool=LocalPool(1), quarantine=quarantine, progress=lambda *_: None
    )


def _measure(dataset: Dataset, folders: list[Path], *, rounds: int) -> list[list[dict[str, Any]]]:
    """What `_serve` says by round and side; the round before, which compiles, is left out."""
    command = [sys.executable, __file__, "--serve", dataset.url]
    start = partial(subprocess.Popen, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    sides = [start(cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)}) for folder in folders]
    said: list[list[dict[str, Any]]] = []
    for _ in range(rounds + 1):
        said.append([])
        for side in sides:
            assert side.stdin
            assert side.stdout
            print(file=side.stdin, flush=True)
            said[-1].append(json.loads(side.stdout.readline()))
    for side in sides:
        side.communicate()
    return said[1:]


def _serve(dataset: Dataset) -> dict[str, Any]:
    """One side: at each line read, prepares the shard, runs its kernels, and prints what they took, and the bytes."""
    images = [sample.image for sample in dataset.split("train").read_shard(0) if isinstance(sample, Sample)]
    settings = PrepareSettings(name="measured", priors=DEFAULT_PRIORS)
    quarantine = Quarantine(Path(dataset.url).parent / "quarantine.jsonl", limit=0)
    for _ in sys.stdin:
        time_s: dict[str, float] = defaultdict(float)
        with _timed(time_s, "stage"):
            made = prepare(dataset, settings, pool=_ThisProcess(), quarantine=quarantine, progress=lambda *_: None)
        shutil.rmtree(made.url)
        sizes = _kernels(images, time_s)
        time_s["kernels"] = sum(time_s.values()) - time_s["stage"]
        by_image = {name: 1e3 * seconds / len(images) for name, seconds in time_s.items()}
        print(json.dumps(by_image | {"bytes": {name: size / len(images) for name, size in sizes.items()}}), flush=True)
    return {}


class _ThisProcess:
    """A pool of this process alone, so that its CPU time is that of the stage."""

    @staticmethod
    def map(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        return enumerate(map(function, items))


def _kernels(images: list[bytes], time_s: dict[str, float]) -> dict[str, int]:
    """Adds the CPU seconds of each kernel to `time_s`; returns the bytes of the maps by name."""
    keep_freed_memory()
    sizes: dict[str, int] = defaultdict(int)
    for data in images:
        with _timed(time_s, "decode"):
            image = ImageViews(decode_image(data))
        with _timed(time_s, "views"):
            for view in VIEWS:
                getattr(image, view, None)
        for prior in DEFAULT_PRIORS:
            with _timed(time_s, prior.name):
                map_HWC = prior.map(image)
            with _timed(time_s, "encode"):
                stored = store_map(prior, map_HWC)
            sizes[prior.name] += len(stored.data)
    return sizes


@contextmanager
def _timed(time_s: dict[str, float], name: str) -> Iterator[None]:
    start_s = time.process_time()
    yield
    time_s[name] += time.process_time() - start_s


if __name__ == "__main__":
    logger.setLevel("WARNING")  # the result alone goes to stdout
    main()
