"""Measures edge priors as boundary detectors on BSDS500: ODS and OIS, at the image's own size and as they are stored.

    python -m zipfile -e ../shared/data/bsds500.zip data
    python tools/bench_boundaries.py --data data/bsds500 --json
    python tools/bench_boundaries.py --data data/bsds500 --split val --prior '{"kind": "edge", "stride": 4}'

`native`: the map of the image with a cell a pixel, not thinned. `stored`: the map of the image at 224 x 224 px, through
its codec, and enlarged to the image's size. Controls are Sobel's and Canny's gradients. Tune on `val`; `test` is looked
at last.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from dpkd.data.images import decode_image
from dpkd.evaluation.boundaries import THRESHOLDS, Counts, boundary_counts, boundary_score, region_boundary
from dpkd.launch.pool import LocalPool
from dpkd.log import Progress
from dpkd.priors import Prior
from dpkd.priors.catalogue.edge import Edge
from dpkd.priors.image_views import ImageViews
from dpkd.priors.record import store_map

Image = NDArray[np.uint8]
Map = NDArray[np.float32]
STORED_PX = 224


@dataclass(frozen=True)
class Detector:
    """A boundary map of an image, on the image's own grid, under a name."""

    name: str
    draw: Callable[[Image], Map]


def native(prior: Any, image_HWC: Image) -> Map:
    """The prior's map with a cell a pixel, not thinned: the benchmark does that."""
    whole = {"stride": 1} | ({"thin": False} if isinstance(prior, Edge) else {})
    return np.asarray(prior.model_copy(update=whole).map(ImageViews(image_HWC))[:, :, 0], np.float32)


def stored(prior: Prior, image_HWC: Image) -> Map:
    """The prior's map as a reader gets it for the image at 224 x 224 px, enlarged to the image's size."""
    height, width = image_HWC.shape[:2]
    small_HWC = np.asarray(cv2.resize(image_HWC, (STORED_PX, STORED_PX), interpolation=cv2.INTER_AREA), np.uint8)
    read_HWC = store_map(prior, prior.map(ImageViews(small_HWC))).decode()
    large_HW = cv2.resize(read_HWC[:, :, 0], (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(np.asarray(large_HW, np.float32), 0, 1)


def sobel(image_HWC: Image) -> Map:
    """Sobel's gradient of luma."""
    return _gradient(ImageViews(image_HWC).grey_HW)


def gaussian(image_HWC: Image, *, sigma: float = 2.0) -> Map:
    """The gradient of smoothed luma, as Canny's detector takes it."""
    return _gradient(np.asarray(cv2.GaussianBlur(ImageViews(image_HWC).grey_HW, (0, 0), sigma), np.float32))


def _gradient(grey_HW: Map) -> Map:
    slope_HW = cv2.magnitude(cv2.Sobel(grey_HW, cv2.CV_32F, 1, 0), cv2.Sobel(grey_HW, cv2.CV_32F, 0, 1))
    return np.sqrt(np.minimum(np.asarray(slope_HW, np.float32) / np.float32(8 * 64), np.float32(1)))


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Runs the benchmark and prints a row for each detector; returns the rows."""
    options = _options(arguments)
    paths = _images(Path(options.data) / options.split)[: options.images]
    rows = []
    for detector in _detectors(options):
        rows.append(_measure(detector, paths, thresholds=options.thresholds, processes=options.processes))
        if not options.json:
            row = rows[-1]
            print(f"{row['name']:<40} ODS {row['ods']:.4f}  OIS {row['ois']:.4f}  {row['ms']:.2f} ms", flush=True)
    if options.json:
        done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
        head = {"commit": done.stdout.strip(), "date": time.strftime("%Y-%m-%d"), "split": options.split}
        print(json.dumps({**head, "images": len(paths), "rows": rows}, indent=1))
    return rows


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with val/ and test/ of BSDS500")
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--prior", action="append", help="settings as JSON of a prior to measure instead")
    parser.add_argument("--images", type=int, help="only the first so many")
    parser.add_argument(
        "--thresholds", type=int, default=len(THRESHOLDS), help="fewer are faster, F then a little lower"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    return parser.parse_args(arguments)


def _images(folder: Path) -> list[Path]:
    paths = [path for path in sorted(folder.glob("*.jpg")) if list(folder.glob(f"{path.stem}_seg*.png"))]
    if not paths:
        raise SystemExit(
            f"{folder}: no <id>.jpg with its <id>_seg<k>.png there; unpack bsds500.zip and give its folder"
        )
    return paths


def _detectors(options: argparse.Namespace) -> list[Detector]:
    if options.prior:
        return [
            Detector(f"{text}, {way.__name__}", partial(way, _prior(text)))
            for text in options.prior
            for way in (native, stored)
        ]
    return [
        Detector("Sobel", sobel),
        Detector("Gaussian gradient of luma", gaussian),
        Detector("edge, native", partial(native, Edge())),
        Detector("edge, stored", partial(stored, Edge())),
        Detector("edge, not thinned, stored", partial(stored, Edge(thin=False))),
    ]


def _prior(text: str) -> Prior:
    try:
        prior: Prior = TypeAdapter(Prior).validate_json(text)
    except ValidationError as error:
        raise SystemExit(f"--prior {text}: {error}") from error
    return prior


@dataclass(frozen=True)
class _Job:
    detector: Detector
    path: Path
    thresholds: tuple[float, ...]


def _measure(detector: Detector, paths: list[Path], *, thresholds: int, processes: int) -> dict[str, Any]:
    cuts = tuple(np.linspace(THRESHOLDS[0], THRESHOLDS[-1], thresholds).tolist())
    jobs = [_Job(detector, path, cuts) for path in paths]
    counts: dict[int, tuple[Counts, float]] = {}
    with Progress(detector.name, len(paths), shown=sys.stderr.isatty()) as progress:
        for i, found in LocalPool(processes).map(_count, jobs):
            counts[i] = found
            progress.advance()
    score = boundary_score([counts[i][0] for i in range(len(paths))], thresholds=cuts)
    ms = 1e3 * float(np.median([seconds for _, seconds in counts.values()]))
    return {"name": detector.name, **{key: round(value, 4) for key, value in vars(score).items()}, "ms": round(ms, 3)}


def _count(job: _Job) -> tuple[Counts, float]:
    """The counts of one image, and the CPU seconds of its map, the second time that it is drawn."""
    cv2.setNumThreads(1)
    image_HWC = decode_image(job.path.read_bytes())
    drawn = [
        region_boundary(np.asarray(cv2.imread(str(path), cv2.IMREAD_UNCHANGED), np.int64))
        for path in sorted(job.path.parent.glob(f"{job.path.stem}_seg*.png"))
    ]
    job.detector.draw(image_HWC)
    start_s = time.process_time()
    map_HW = job.detector.draw(image_HWC)
    taken_s = time.process_time() - start_s
    return boundary_counts(map_HW, drawn, thresholds=job.thresholds), taken_s


if __name__ == "__main__":
    main()
