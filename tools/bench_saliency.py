"""Measures how well `saliency` and `foreground` find objects, against masks that people or the drawing tool made.

    python tools/make_sample_data.py data/sample
    python -m zipfile -e ../shared/data/dsb2018_dev.zip data
    python tools/bench_saliency.py --data data/sample/base --data data/dsb2018_dev/test

An image IMAGE.jpg counts where IMAGE.mask.png or IMAGE.instances.png stands beside it; every value above 0 is figure.
Measured are F (β² = 0.3) at each image's own threshold, twice its mean (Achanta et al. 2009), the best mean F of one
threshold for all images, IoU at that threshold, and the mean absolute error.
Controls: a Gaussian in the middle of the image, and Otsu's threshold of luma, bright or dark.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dpkd.data.images import decode_image
from dpkd.log import Progress
from dpkd.priors.base import ImageViews
from dpkd.priors.catalogue.regions import Superpixel
from dpkd.priors.catalogue.saliency import Saliency
from dpkd.priors.derived import DERIVED

Map = NDArray[np.float32]

BETA_SQUARE = 0.3
"""Weighs precision above recall, as saliency is measured since Achanta et al. 2009."""
THRESHOLDS = np.linspace(0, 1, 51)


def f_measure(found: NDArray[Any], figure: NDArray[Any]) -> NDArray[np.float64]:
    """(1 + β²) P R / (β² P + R) over the last two axes; 0 where nothing is found that is figure."""
    hits = np.logical_and(found, figure).sum((-2, -1))
    precision = hits / np.maximum(found.sum((-2, -1)), 1)
    recall = hits / np.maximum(figure.sum((-2, -1)), 1)
    return np.asarray((1 + BETA_SQUARE) * precision * recall / np.maximum(BETA_SQUARE * precision + recall, 1e-12))


def overlap(found: NDArray[Any], figure: NDArray[Any]) -> NDArray[np.float64]:
    """Intersection over union over the last two axes; 1 where both are empty."""
    union = np.logical_or(found, figure).sum((-2, -1))
    return np.where(union == 0, 1.0, np.logical_and(found, figure).sum((-2, -1)) / np.maximum(union, 1))


def centre(image: ImageViews) -> Map:
    """A Gaussian in the middle, a quarter of each side wide."""
    height, width = image.size
    y_H, x_W = (np.linspace(-2, 2, side, dtype=np.float32) for side in (height, width))
    return np.exp(np.float32(-0.5) * (y_H[:, None] ** 2 + x_W**2)).astype(np.float32)[:, :, None]


def otsu(image: ImageViews) -> Map:
    """Luma above or below Otsu's threshold, whichever is less of the image."""
    _, bright_HW = cv2.threshold(image.grey8_HW, 0, 1, cv2.THRESH_OTSU)
    figure_HW = bright_HW if np.mean(bright_HW) < 0.5 else 1 - bright_HW
    return np.asarray(figure_HW, np.float32)[:, :, None]


def foreground(image: ImageViews) -> Map:
    """The derived map of the default saliency and superpixels."""
    maps = {"saliency": Saliency().map(image), "superpixel": Superpixel().map(image)}
    return np.asarray(DERIVED["foreground"].derive(maps), np.float32)


METHODS: dict[str, Callable[[ImageViews], Any]] = {
    "saliency": Saliency().map,
    "foreground": foreground,
    "control: centre": centre,
    "control: otsu": otsu,
}


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Runs the benchmark and prints a row of JSON for each folder and method; returns the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="append", required=True, help="folder of images with masks beside them")
    parser.add_argument("--images", type=int, default=300, help="at most so many of each folder, evenly spread")
    options = parser.parse_args(arguments)
    cv2.setNumThreads(1)
    rows = []
    for folder in options.data:
        pairs = _pairs(Path(folder))
        step = max(1, len(pairs) // options.images)
        rows += measure(pairs[::step][: options.images], folder=folder)
    print(json.dumps(rows, indent=1))
    return rows


def measure(pairs: list[tuple[Path, Path]], *, folder: str) -> list[dict[str, Any]]:
    """A row for each method: its figures over the images, each at its own size."""
    rows = []
    for name, method in METHODS.items():
        figures: dict[str, list[Any]] = {"f": [], "iou": [], "own": [], "error": [], "ms": []}
        with Progress(f"{folder}, {name}", len(pairs)) as progress:
            for image_path, mask_path in pairs:
                image = ImageViews(decode_image(image_path.read_bytes()))
                start_s = time.process_time()
                map_HW = cv2.resize(method(image)[:, :, 0], image.size[::-1], interpolation=cv2.INTER_LINEAR)
                figures["ms"].append(1e3 * (time.process_time() - start_s))
                figure_HW = np.asarray(cv2.imread(str(mask_path), cv2.IMREAD_UNCHANGED), np.int64) > 0
                cut_THW = map_HW[None] >= THRESHOLDS[:, None, None].astype(np.float32)
                figures["f"].append(f_measure(cut_THW, figure_HW))
                figures["iou"].append(overlap(cut_THW, figure_HW))
                figures["own"].append(f_measure(map_HW >= min(1.0, 2 * float(map_HW.mean())), figure_HW))
                figures["error"].append(np.abs(map_HW - figure_HW).mean())
                progress.advance()
        f_T, iou_T, own, error = (np.mean(figures[key], axis=0) for key in ("f", "iou", "own", "error"))
        best = int(f_T[1:].argmax()) + 1  # everything is above 0
        summary = {"max_f": f_T[best], "own_f": own, "iou": iou_T[best], "error": error, "threshold": THRESHOLDS[best]}
        rounded = {key: round(float(value), 4) for key, value in summary.items()}
        ms = round(float(np.median(figures["ms"])), 2)
        rows.append({"folder": folder, "method": name, "images": len(pairs), **rounded, "ms": ms})
    return rows


def _pairs(folder: Path) -> list[tuple[Path, Path]]:
    pairs = []
    for path in sorted([*folder.rglob("*.jpg"), *folder.rglob("*.png")]):
        for ending in (".mask.png", ".instances.png"):
            mask = path.with_name(path.stem + ending)
            if "." not in path.stem and mask.exists():
                pairs.append((path, mask))
    if not pairs:
        raise SystemExit(
            f"{folder}: no image with its .mask.png or .instances.png beside it; give such a folder to --data"
        )
    return pairs


if __name__ == "__main__":
    main()
