"""Measures the prepare stage: images/s with 1 and 2 workers, the bare kernels, bytes and decoding.

Everything is measured in one run: the kernels alone in one process (decode, the shared views of an image, each prior's
map, each map's encoding), then the whole stage with 1 and 2 workers on the same images as shards.

    python -m tools.bench_prepare                          drawn images
    python -m tools.bench_prepare --data FOLDER            the images below FOLDER, scaled to the size measured
    python -m tools.bench_prepare --data FOLDER --against CHECKOUT

The last compares this code with that of another checkout: two processes prepare the same shard and run the kernels in
turns, and the median ratio of their CPU times counts.

A stage is timed from its first finished shard to its last, so that the start of processes does not count; that is
`start_s`. Nothing else should run on the machine.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2

from dpkd.backends.local_pool import LocalPool
from dpkd.data.images import decode_image
from dpkd.data.settings import FolderSource
from dpkd.data.shards import Dataset, Sample
from dpkd.errors import UserError
from dpkd.log import logger
from dpkd.priors import DEFAULT_PRIORS
from dpkd.priors.base import ImageViews, keep_freed_memory
from dpkd.priors.record import StoredMap, store_map
from dpkd.priors.store import PriorSet
from dpkd.report.quarantine import Quarantine
from dpkd.settings import DataSettings, PrepareSettings
from dpkd.stages.pack import pack
from dpkd.stages.prepare import prepare
from tools.make_sample_data import SampleSettings, draw_samples

ROOT = Path(__file__).resolve().parents[1]
VIEWS = ("lab_HWC", "half_lab_HWC", "grey8_HW", "grey_HW")
"""The views of an image that more than one prior takes; another checkout may have others."""
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark and prints its result as JSON; returns it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of images; none draws them")
    parser.add_argument("--images", type=int, default=1600, help="images to prepare; they repeat")
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--shards", type=int, default=16, help="shards that they are packed into")
    parser.add_argument("--kernel-images", type=int, default=400, help="images that the bare kernels are timed on")
    parser.add_argument("--repeats", type=int, default=1, help="times that each number of workers is measured")
    parser.add_argument("--against", metavar="CHECKOUT", help="compare with the code in this folder")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each side of a comparison")
    parser.add_argument("--serve", metavar="SHARDS", help=argparse.SUPPRESS)  # one side of a comparison
    options = parser.parse_args(arguments)
    cv2.setNumThreads(1)
    if options.serve:
        return _serve(Dataset.open(options.serve))
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = _images(options, folder / "drawn")
        dataset = _pack(images, folder, samples_per_shard=max(1, len(images) // options.shards))
        result: dict[str, Any] = {
            "command": "python -m tools.bench_prepare " + " ".join(sys.argv[1:] if arguments is None else arguments),
            "commit": commit.stdout.strip(),
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{platform.processor()}, {os.cpu_count()} cores seen",
            "images": len(images),
            "size": options.size,
            "data": options.data or "drawn",
        }
        if options.against:
            result |= compare(dataset, Path(options.against), rounds=options.rounds)
            print(json.dumps(result, indent=1))
            return result
        ((_, kernels),) = LocalPool(1).map(_kernels, [images[: options.kernel_images]])
        result |= kernels
        for workers in (1, 2):
            runs = [_stage(dataset, workers=workers, name=f"{workers}-{i}") for i in range(options.repeats)]
            result[f"workers_{workers}"] = max(runs, key=lambda run: run["images_per_s"])
        result |= _decoding(dataset, num_samples=min(300, len(images)))
    rates = {workers: result[f"workers_{workers}"]["images_per_s"] for workers in (1, 2)}
    result["two_workers_over_one"] = round(rates[2] / rates[1], 3)
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


def _pack(images: list[bytes], folder: Path, *, samples_per_shard: int) -> Dataset:
    for i, image in enumerate(images):
        path = folder / "images" / "train" / f"class{i % 2}" / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    settings = DataSettings(source=FolderSource(path=str(folder / "images")), samples_per_shard=samples_per_shard)
    quarantine = Quarantine(folder / "quarantine.jsonl", limit=0)
    return pack(
        settings, str(folder / "shards"), seed=0, pool=LocalPool(2), quarantine=quarantine, progress=lambda *_: None
    )


def _kernels(images: list[bytes]) -> dict[str, Any]:
    """Mean CPU milliseconds of each kernel, the bytes of each map, and their sums; run in a process of its own."""
    cv2.setNumThreads(1)
    keep_freed_memory()
    for prior in DEFAULT_PRIORS:
        prior.map(ImageViews(decode_image(images[0])))  # compiles
    time_s: dict[str, float] = defaultdict(float)
    sizes: dict[str, list[int]] = defaultdict(list)
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
            sizes[prior.name].append(len(stored.data))
    kernel_ms = {name: 1e3 * seconds / len(images) for name, seconds in time_s.items()}
    size_bytes = {name: round(statistics.mean(of_name)) for name, of_name in sizes.items()}
    return {
        "kernel_ms": {name: round(ms, 3) for name, ms in kernel_ms.items()},
        "kernels_ms": round(sum(kernel_ms.values()), 3),
        "map_bytes": size_bytes,
        "maps_bytes": sum(size_bytes.values()),
    }


@contextmanager
def _timed(time_s: dict[str, float], name: str) -> Iterator[None]:
    start_s = time.process_time()
    yield
    time_s[name] += time.process_time() - start_s


class _ThisProcess:
    """A pool of this process alone, so that its CPU time is that of the stage."""

    @staticmethod
    def map(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        return enumerate(map(function, items))


def compare(dataset: Dataset, checkout: Path, *, rounds: int) -> dict[str, Any]:
    """Medians of each side's CPU milliseconds an image, and of the other's over this code's, by kernel and stage."""
    sides = []
    for folder in (ROOT, checkout.resolve()):
        command = [sys.executable, __file__, "--serve", dataset.url]
        environment = os.environ | {"PYTHONPATH": str(folder)}
        sides.append(
            subprocess.Popen(
                command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        )
    rows: list[list[dict[str, float]]] = []
    for _ in range(rounds + 1):
        rows.append([])
        for side in sides:
            assert side.stdin and side.stdout
            print(file=side.stdin, flush=True)
            rows[-1].append(json.loads(side.stdout.readline()))
    for side in sides:
        side.communicate()
    rows = rows[1:]  # the first compiles
    table = {}
    for name in rows[0][0]:
        pairs = [(new[name], old[name]) for new, old in rows]
        new_ms, old_ms = (round(statistics.median(of_side), 3) for of_side in zip(*pairs, strict=True))
        ratios = statistics.quantiles((old / max(new, 1e-6) for new, old in pairs), n=4)
        table[name] = {"ms": new_ms, "other_ms": old_ms, "quartiles": [round(ratio, 3) for ratio in ratios]}
    return {"against": str(checkout), "rounds": rounds, "comparison": table}


def _serve(dataset: Dataset) -> dict[str, Any]:
    """One side of a comparison: at each line read, prints the CPU milliseconds of the stage and of each kernel."""
    images = [sample.image for sample in dataset.split("train").read_shard(0) if isinstance(sample, Sample)]
    priors = PrepareSettings(name="comparison", priors=DEFAULT_PRIORS)
    quarantine = Quarantine(Path(dataset.url).parent / "quarantine.jsonl", limit=0)
    for _ in sys.stdin:
        start_s = time.process_time()
        made = prepare(dataset, priors, pool=_ThisProcess(), quarantine=quarantine, progress=lambda *_: None)
        stage_ms = 1e3 * (time.process_time() - start_s) / len(images)
        shutil.rmtree(made.url)
        kernels = _kernels(images)
        of_map = {name: ms for name, ms in kernels["kernel_ms"].items()}
        print(json.dumps({"stage": stage_ms, "kernels": kernels["kernels_ms"]} | of_map), flush=True)
    return {}


def _stage(dataset: Dataset, *, workers: int, name: str) -> dict[str, float]:
    """Images/s of the whole stage with that many workers, and what its start took."""
    marks = [(time.perf_counter(), 0)]
    quarantine = Quarantine(Path(dataset.url).parent / "quarantine.jsonl", limit=0)
    prepare(
        dataset,
        PrepareSettings(name=name, priors=DEFAULT_PRIORS),
        pool=LocalPool(workers),
        quarantine=quarantine,
        progress=lambda done, _total: marks.append((time.perf_counter(), done)),
    )
    first, last = marks[workers], marks[-1]  # by then every worker has come up and finished a shard
    rate = (last[1] - first[1]) / (last[0] - first[0])
    start_s = first[0] - marks[0][0] - first[1] / rate
    return {"images_per_s": round(rate, 2), "start_s": round(start_s, 2), "whole_s": round(last[0] - marks[0][0], 2)}


def _decoding(dataset: Dataset, *, num_samples: int) -> dict[str, Any]:
    """Milliseconds to read one sample's maps: each map decoded, all of them read and verified, beside the image."""
    split, maps = dataset.split("train"), PriorSet.open(dataset.url, "1-0").split("train")
    samples = [split.read(i) for i in range(num_samples)]
    stored: dict[str, list[StoredMap]] = defaultdict(list)
    for sample in samples:
        image = ImageViews(decode_image(sample.image))
        for prior in DEFAULT_PRIORS:
            stored[prior.name].append(store_map(prior, prior.map(image)))
    map_ms = {name: _mean_ms(maps_of, StoredMap.decode) for name, maps_of in stored.items()}
    return {
        "decode_map_ms": {name: round(ms, 4) for name, ms in map_ms.items()},
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


if __name__ == "__main__":
    logger.setLevel("WARNING")  # the result alone goes to stdout
    try:
        main()
    except UserError as error:
        raise SystemExit(str(error)) from error
