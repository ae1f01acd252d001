"""Measures superpixels as a reader gets them: how well regions keep to those that people drew on BSDS500.

    python -m zipfile -e ../shared/data/bsds500.zip data
    python -m tools.bench_superpixels --data data/bsds500
    python -m tools.bench_superpixels --data data/bsds500 --size 84 --prior '{"kind": "superpixel", "stride": 2}'

The map of the image at `--size` pixels a side is enlarged to the image's size. Measured are boundary recall (the share
of an annotator's boundary within `TOLERANCE` of a region's boundary), achievable segmentation accuracy (the share of
pixels that are right if each region takes its most frequent label), undersegmentation error (Neubert & Protzel 2012)
and the number of regions, on which all three depend: means over annotators, then over images. Controls: a grid of
squares, about as many, and the map of the image before, whose recall says how much is due to long boundaries.
"""

import argparse
import json
import time
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
from tools.bench_boundaries import TOLERANCE, region_boundary

Labels = NDArray[np.integer[Any]]


def figures(label_HW: Labels, drawn_HW: Labels) -> tuple[float, float, float]:
    """Boundary recall, achievable segmentation accuracy and undersegmentation error of regions on an annotator's."""
    away_HW = cv2.distanceTransform((~region_boundary(label_HW)).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    recalled = away_HW[region_boundary(drawn_HW)] <= TOLERANCE * np.hypot(*label_HW.shape)
    shape = int(label_HW.max()) + 1, int(drawn_HW.max()) + 1
    pair_N = np.ravel_multi_index((label_HW.ravel(), drawn_HW.ravel()), shape)
    count_RS = np.bincount(pair_N, minlength=shape[0] * shape[1]).reshape(shape)
    leak = np.minimum(count_RS, count_RS.sum(1, keepdims=True) - count_RS).sum()
    return float(recalled.mean()), float(count_RS.max(1).sum() / label_HW.size), float(leak / label_HW.size)


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Runs the benchmark and prints the figures of each method as JSON; returns them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with val/ and test/ of BSDS500")
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--size", type=int, default=224, help="side of the images that maps are computed of, in pixels")
    parser.add_argument(
        "--prior", default=Superpixel().model_dump_json(), help="settings as JSON of a prior with labels"
    )
    parser.add_argument("--images", type=int, help="only the first so many")
    options = parser.parse_args(arguments)
    cv2.setNumThreads(1)
    prior: Prior = TypeAdapter(Prior).validate_json(options.prior)
    side = round(options.size / 16)
    found = {"superpixel": None, "squares": np.arange(side * side).reshape(side, side), "image before": None}
    scores: dict[str, list[Any]] = {name: [] for name in found}
    paths = sorted((Path(options.data) / options.split).glob("*.jpg"))[: options.images]
    with Progress("superpixels", len(paths)) as progress:
        for path in paths:
            image_HWC = decode_image(path.read_bytes())
            small_HWC = cv2.resize(image_HWC, (options.size, options.size), interpolation=cv2.INTER_AREA)
            small, start_s = ImageViews(np.asarray(small_HWC, np.uint8)), time.process_time()
            map_HWC = prior.map(small)
            ms = 1e3 * (time.process_time() - start_s)
            found |= {"superpixel": map_HWC[:, :, 0], "image before": found["superpixel"]}
            masks = [cv2.imread(str(mask), cv2.IMREAD_UNCHANGED) for mask in path.parent.glob(f"{path.stem}_seg*.png")]
            for name, map_HW in found.items():
                if map_HW is not None:
                    size = image_HWC.shape[1::-1]
                    label_HW = np.asarray(
                        cv2.resize(map_HW.astype(np.int32), size, interpolation=cv2.INTER_NEAREST), np.int64
                    )
                    of_masks = [figures(label_HW, np.asarray(mask, np.int64)) for mask in masks]
                    scores[name].append([*np.mean(of_masks, axis=0), len(np.unique(map_HW)), ms])
            progress.advance()
    names = ("recall", "accuracy", "leak", "regions", "ms")
    result = {
        name: dict(zip(names, np.round([*np.mean(rows, 0)[:4], np.median(rows, 0)[4]], 4).tolist(), strict=True))
        for name, rows in scores.items()
        if rows
    }
    print(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    main()
