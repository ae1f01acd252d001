"""Measures the prepare stage: images/s, its overhead over the bare kernels, workers side by side, bytes and decoding.

Everything is measured in one run: the kernels alone in one process (decode, the shared views of a picture, each prior's
map, each map's encoding), then the whole stage with 1 and 2 workers on the same images as shards. The overhead is that
of a third run, in which the one worker times the bare kernels on the images of each shard right before or after the
stage's work on it: the median over the shards, so that it stands even where the machine's pace changes.

    python tools/bench_prepare.py --json                          drawn images
    python tools/bench_prepare.py --data FOLDER --json            the images below FOLDER, scaled to the size measured

A stage is timed from its first finished shard to its last, so that the start of processes does not count; it stands in
the result as `start_s`. Nothing else should run on the machine.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dpkd.data.images import decode_image
from dpkd.data.settings import FolderSource
from dpkd.data.shards import Dataset, Sample, Split
from dpkd.errors import UserError
from dpkd.launch.pool import LocalPool, never
from dpkd.priors import DEFAULT_PRIORS
from dpkd.priors.image_views import ImageViews
from dpkd.priors.memory import keep_freed_memory
from dpkd.priors.record import StoredMap, store_map
from dpkd.priors.store import PriorSet
from dpkd.report.quarantine import Quarantine
from dpkd.settings import DataSettings, PrepareSettings
from dpkd.stages.pack import pack
from dpkd.stages.prepare import prepare

VIEWS = ("lab_HWC", "lab8_HWC", "grey8_HW", "grey_HW")
"""The views of a picture that more than one prior takes."""
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark and prints its result; returns it."""
    options = _options(arguments)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = _images(options)
        _say(f"{len(images)} images of {options.size} px")
        dataset = _pack(images, folder, samples_per_shard=max(1, len(images) // options.shards))
        result: dict[str, Any] = {
            "command": "python tools/bench_prepare.py " + " ".join(sys.argv[1:] if arguments is None else arguments),
            "commit": _commit(),
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{_cpu()}, {os.cpu_count()} cores seen",
            "images": len(images),
            "size": options.size,
            "data": options.data or "drawn",
        }
        ((_, kernels),) = LocalPool(1).map(_kernels, [images[: options.kernel_images]])
        result |= kernels
        for workers in (1, 2):
            result[f"workers_{workers}"] = _stage(dataset, workers=workers, repeats=options.repeats)
        result |= _overhead(dataset, folder / "pace.jsonl")
        result |= _decoding(dataset, num_samples=min(300, len(images)))
    rates = {workers: result[f"workers_{workers}"]["images_per_s"] for workers in (1, 2)}
    result["two_workers_over_one"] = round(rates[2] / rates[1], 3)
    print(json.dumps(result, indent=1) if options.json else _table(result))
    return result


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of images; none draws them")
    parser.add_argument("--images", type=int, default=1600, help="images to prepare; those of --data repeat")
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--shards", type=int, default=16, help="shards that they are packed into")
    parser.add_argument("--kernel-images", type=int, default=400, help="images that the bare kernels are timed on")
    parser.add_argument("--repeats", type=int, default=1, help="times that each number of workers is measured")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args(arguments)


def _images(options: argparse.Namespace) -> list[bytes]:
    """JPEG files, quality 90."""
    if options.data is None:
        return [_jpeg(_draw(seed, options.size)) for seed in range(options.images)]
    paths = sorted(path for path in Path(options.data).rglob("*") if path.suffix.lower() in IMAGE_ENDINGS)
    paths = [path for path in paths if "_" not in path.stem and ".mask" not in path.name]
    if not paths:
        raise SystemExit(f"{options.data}: no image below it; give a folder of {', '.join(IMAGE_ENDINGS)} to --data")
    files = [_jpeg(_square(path, options.size)) for path in paths[: options.images]]
    return [files[i % len(files)] for i in range(options.images)]


def _square(path: Path, size: int) -> NDArray[np.uint8]:
    image_HWC = cv2.imread(str(path))
    if image_HWC is None:
        raise SystemExit(f"{path}: not an image")
    return np.asarray(cv2.resize(image_HWC, (size, size), interpolation=cv2.INTER_AREA), np.uint8)


def _draw(seed: int, size: int) -> NDArray[np.uint8]:
    """Clouds of several scales with a few objects: about as many boundaries and bytes as a photograph."""
    random = np.random.default_rng(seed)
    image_HWC = np.full((size, size, 3), random.uniform(80, 170, 3), np.float32)
    for cells in (3, 8, 24, 80):
        coarse_HWC = random.normal(0, 40 / cells**0.4, (cells, cells, 3)).astype(np.float32)
        image_HWC += cv2.resize(coarse_HWC, (size, size), interpolation=cv2.INTER_CUBIC)
    for _ in range(6):
        centre = tuple(int(each) for each in random.integers(0, size, 2))
        axes = tuple(int(each) for each in random.integers(size // 16, size // 4, 2))
        colour = tuple(float(each) for each in random.uniform(20, 235, 3))
        cv2.ellipse(image_HWC, centre, axes, float(random.uniform(0, 180)), 0, 360, colour, -1, cv2.LINE_AA)
    return np.clip(image_HWC + random.normal(0, 4, image_HWC.shape), 0, 255).astype(np.uint8)


def _jpeg(image_HWC: NDArray[np.uint8]) -> bytes:
    done, data = cv2.imencode(".jpg", image_HWC, (cv2.IMWRITE_JPEG_QUALITY, 90))
    assert done, "OpenCV could not write a JPEG"
    return data.tobytes()


def _pack(images: list[bytes], folder: Path, *, samples_per_shard: int) -> Dataset:
    for i, image in enumerate(images):
        path = folder / "images" / "train" / f"class{i % 2}" / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    settings = DataSettings(source=FolderSource(path=str(folder / "images")), samples_per_shard=samples_per_shard)
    quarantine = Quarantine(folder / "quarantine.jsonl", limit=0)
    return pack(settings, str(folder / "shards"), seed=0, pool=LocalPool(2), quarantine=quarantine, progress=_silent)


def _kernels(images: list[bytes]) -> dict[str, Any]:
    """Mean wall milliseconds of each kernel, the bytes of each map, and their sums; run in a process of its own."""
    cv2.setNumThreads(1)
    keep_freed_memory()
    for prior in DEFAULT_PRIORS:
        prior.map(ImageViews(decode_image(images[0])))  # compiles
    time_s: dict[str, float] = defaultdict(float)
    sizes: dict[str, list[int]] = defaultdict(list)
    for image in images:
        with _timed(time_s, "decode"):
            picture = ImageViews(decode_image(image))
        with _timed(time_s, "views"):
            for view in VIEWS:
                getattr(picture, view)
        for prior in DEFAULT_PRIORS:
            with _timed(time_s, prior.name):
                map_HWC = prior.map(picture)
            with _timed(time_s, "encode"):
                stored = store_map(prior, map_HWC)
            sizes[prior.name].append(len(stored.data))
    kernel_ms = {name: 1e3 * each / len(images) for name, each in time_s.items()}
    size_bytes = {name: round(statistics.mean(each)) for name, each in sizes.items()}
    return {
        "kernel_ms": {name: round(each, 3) for name, each in kernel_ms.items()},
        "kernels_ms": round(sum(kernel_ms.values()), 3),
        "map_bytes": size_bytes,
        "maps_bytes": sum(size_bytes.values()),
    }


@contextmanager
def _timed(time_s: dict[str, float], name: str) -> Iterator[None]:
    start_s = time.perf_counter()
    yield
    time_s[name] += time.perf_counter() - start_s


def _stage(dataset: Dataset, *, workers: int, repeats: int) -> dict[str, float]:
    """Images/s of the whole stage with that many workers, the best of the repeats, and what its start took."""
    runs = [_stage_once(dataset, workers=workers, name=f"{workers}-{i}") for i in range(repeats)]
    best = max(runs, key=lambda run: run["images_per_s"])
    _say(f"{workers} workers: {best['images_per_s']} images/s")
    return best


def _stage_once(dataset: Dataset, *, workers: int, name: str) -> dict[str, float]:
    marks = [(time.perf_counter(), 0)]
    quarantine = Quarantine(Path(dataset.url).parent / "quarantine.jsonl", limit=0)
    prepare(
        dataset,
        PrepareSettings(name=name),
        pool=LocalPool(workers),
        quarantine=quarantine,
        progress=lambda done, _total: marks.append((time.perf_counter(), done)),
    )
    first, last = marks[workers], marks[-1]  # by then every worker has come up and finished a shard
    rate = (last[1] - first[1]) / (last[0] - first[0])
    start_s = first[0] - marks[0][0] - first[1] / rate
    return {"images_per_s": round(rate, 2), "start_s": round(start_s, 2), "whole_s": round(last[0] - marks[0][0], 2)}


def _overhead(dataset: Dataset, times: Path) -> dict[str, Any]:
    """What the stage takes beyond the bare kernels, over theirs: the median over the shards, and the quartiles."""
    prepare(
        dataset,
        PrepareSettings(name="paced"),
        pool=_Paced(dataset.split("train"), times),
        quarantine=Quarantine(times.parent / "quarantine.jsonl", limit=0),
        progress=_silent,
    )
    ratios = [stage_s / kernels_s - 1 for kernels_s, stage_s in map(json.loads, times.read_text().splitlines()[1:])]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"overhead": round(middle, 4), "overhead_quartiles": [round(low, 4), round(high, 4)]}


@dataclass
class _Paced:
    """A pool of one worker that also runs the bare kernels on the images of each shard, and writes down both times."""

    split: Split
    times: Path
    num_workers: int = 1

    def map(
        self, function: Callable[[Any], Any], items: Sequence[Any], *, until: Callable[[], bool] = never
    ) -> Iterator[tuple[int, Any]]:
        """See `dpkd.launch.pool.Pool.map`; the items are the shards, in order."""
        yield from LocalPool(1).map(_BesideKernels(function, self), list(enumerate(items)), until=until)


@dataclass(frozen=True)
class _BesideKernels:
    function: Callable[[Any], Any]
    pool: _Paced

    def __call__(self, item: tuple[int, Any]) -> Any:
        number, task = item
        images = [sample.image for sample in self.pool.split.read_shard(number) if isinstance(sample, Sample)]
        if number % 2:
            kernels_s = _kernels_s(images)
        start_s = time.perf_counter()
        done = self.function(task)
        stage_s = time.perf_counter() - start_s
        if number % 2 == 0:
            kernels_s = _kernels_s(images)
        with self.pool.times.open("a") as file:
            file.write(json.dumps([kernels_s, stage_s]) + "\n")
        return done


def _kernels_s(images: list[bytes]) -> float:
    return float(_kernels(images)["kernels_ms"]) * len(images) / 1e3


def _decoding(dataset: Dataset, *, num_samples: int) -> dict[str, Any]:
    """Milliseconds to read one sample's maps: each map decoded, all of them read and verified, beside the image."""
    split, maps = dataset.split("train"), PriorSet.open(dataset.url, "1-0").split("train")
    samples = [split.read(i) for i in range(num_samples)]
    stored: dict[str, list[StoredMap]] = defaultdict(list)
    for sample in samples:
        picture = ImageViews(decode_image(sample.image))
        for prior in DEFAULT_PRIORS:
            stored[prior.name].append(store_map(prior, prior.map(picture)))
    map_ms = {name: _mean_ms(each, StoredMap.decode) for name, each in stored.items()}
    return {
        "decode_map_ms": {name: round(each, 4) for name, each in map_ms.items()},
        "decode_maps_ms": round(sum(map_ms.values()), 4),
        "read_maps_ms": round(_mean_ms(list(enumerate(samples)), lambda pair: maps.read(*pair)), 4),
        "decode_image_ms": round(_mean_ms([sample.image for sample in samples], decode_image), 4),
    }


def _mean_ms(items: list[Any], function: Callable[[Any], object]) -> float:
    function(items[0])
    start_s = time.perf_counter()
    for item in items:
        function(item)
    return 1e3 * (time.perf_counter() - start_s) / len(items)


def _table(result: dict[str, Any]) -> str:
    lines = [f"{result['images']} images of {result['size']} px, {result['machine']}, commit {result['commit']}"]
    for name, each in result["kernel_ms"].items():
        size = result["map_bytes"].get(name)
        decode = result["decode_map_ms"].get(name)
        lines.append(f"  {name:<12}{each:8.3f} ms" + (f"{size:8,} bytes{decode:9.4f} ms to decode" if size else ""))
    decoding = f"{result['decode_maps_ms']:9.4f} ms to decode (image {result['decode_image_ms']:.4f})"
    lines.append(f"  {'all':<12}{result['kernels_ms']:8.3f} ms{result['maps_bytes']:8,} bytes{decoding}")
    lines += [f"{n} workers: {result[f'workers_{n}']['images_per_s']:.1f} images/s" for n in (1, 2)]
    ratio = result["two_workers_over_one"]
    low, high = result["overhead_quartiles"]
    lines.append(f"overhead over the bare kernels {result['overhead']:.1%} (quartiles {low:.1%}, {high:.1%})")
    lines.append(f"2 workers are {ratio:.2f} times 1")
    return "\n".join(lines)


def _silent(done: int, total: int) -> None:
    """Progress that nobody watches."""


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _cpu() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.processor()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(str(error)) from error
