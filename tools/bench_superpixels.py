"""Measures superpixel priors on BSDS500 as a reader gets them: how well regions keep to those that people drew.

    python -m zipfile -e ../shared/data/bsds500.zip data
    python tools/bench_superpixels.py --data data/bsds500
    python tools/bench_superpixels.py --data data/bsds500 --size 84 --prior '{"kind": "superpixel", "stride": 2}'

The map of the image at `--size` pixels a side goes through its codec and is enlarged to the image's size. Measured are
boundary recall (the share of an annotator's boundary within `TOLERANCE` of a region's boundary), achievable
segmentation accuracy (the share of pixels that are right if each region takes its most frequent label), undersegmentation
error (Neubert & Protzel 2012) and the number of regions, which all three depend on; each is a mean over annotators, then
over images. Controls: a grid of squares of about as many regions, and the same map of the next image.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from dpkd.data.images import decode_image
from dpkd.log import Progress
from dpkd.priors import Prior
from dpkd.priors.base import ImageViews
from dpkd.priors.catalogue.regions import Superpixel
from dpkd.priors.record import store_map
from tools.bench_boundaries import TOLERANCE, region_boundary

Labels = NDArray[np.integer[Any]]


def figures(label_HW: Labels, drawn_HW: Labels) -> tuple[float, float, float]:
    """Boundary recall, achievable segmentation accuracy and undersegmentation error of regions on an annotator's."""
    away_HW = cv2.distanceTransform((~region_boundary(label_HW)).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    recalled = away_HW[region_boundary(drawn_HW)] <= TOLERANCE * np.hypot(*label_HW.shape)
    shape = int(label_HW.max()) + 1, int(drawn_HW.max()) + 1
    pair_HW = np.ravel_multi_index((label_HW, drawn_HW), shape)
    count_RS = np.bincount(pair_HW.ravel(), minlength=shape[0] * shape[1]).reshape(shape)
    leak = np.minimum(count_RS, count_RS.sum(1, keepdims=True) - count_RS).sum()
    return float(recalled.mean()), float(count_RS.max(1).sum() / label_HW.size), float(leak / label_HW.size)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Runs the benchmark and prints a row of JSON for each method; returns the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with val/ and test/ of BSDS500")
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--size", type=int, default=224, help="side of the images that maps are computed of, in pixels")
    parser.add_argument("--prior", default=Superpixel().model_dump_json(), help="settings as JSON of a prior with labels")
    parser.add_argument("--images", type=int, help="only the first so many")
    options = parser.parse_args(arguments)
    cv2.setNumThreads(1)
    prior, size = TypeAdapter(Prior).validate_json(options.prior), (options.size, options.size)
    found: list[tuple[Labels, list[Labels]]] = []
    taken_s = []
    paths = sorted((Path(options.data) / options.split).glob("*.jpg"))[: options.images]
    for path in paths:
        image_HWC = decode_image(path.read_bytes())
        small = ImageViews(np.asarray(cv2.resize(image_HWC, size, interpolation=cv2.INTER_AREA), np.uint8))
        start_s = time.process_time()
        map_HWC = prior.map(small)
        taken_s.append(time.process_time() - start_s)
        masks = sorted(path.parent.glob(f"{path.stem}_seg*.png"))
        drawn = [np.asarray(cv2.imread(str(mask), cv2.IMREAD_UNCHANGED), np.int64) for mask in masks]
        found.append((store_map(prior, map_HWC).decode()[:, :, 0].astype(np.int32), drawn))
    numbers = [len(np.unique(label_HW)) for label_HW, _ in found]
    side = max(1, round(float(np.sqrt(np.mean(numbers)))))
    square_HW = np.arange(side * side, dtype=np.int32).reshape(side, side)
    methods: dict[str, Callable[[int], Labels]] = {
        prior.name: lambda i: found[i][0],
        "control: squares": lambda _: square_HW,
        "control: next image": lambda i: found[(i + 1) % len(found)][0],
    }
    rows = []
    for name, method in methods.items():
        scores = []
        with Progress(name, len(found), shown=sys.stderr.isatty()) as progress:
            for i, (_, drawn) in enumerate(found):
                shape = drawn[0].shape[::-1]
                label_HW = np.asarray(cv2.resize(method(i), shape, interpolation=cv2.INTER_NEAREST), np.int32)
                scores.append(np.mean([figures(label_HW, drawn_HW) for drawn_HW in drawn], axis=0))
                progress.advance()
        recall, accuracy, leak = np.round(np.mean(scores, axis=0), 4).tolist()
        regions = float(np.mean(numbers)) if name != "control: squares" else float(side * side)
        rows.append({"method": name, "recall": recall, "accuracy": accuracy, "leak": leak, "regions": round(regions, 1)})
    rows[0]["ms"] = round(1e3 * float(np.median(taken_s)), 3)
    print(json.dumps(rows, indent=1))
    return rows


if __name__ == "__main__":
    main()
