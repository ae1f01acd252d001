"""Measures edge priors as boundary detectors on BSDS500: ODS and OIS, at the image's own size and as they are stored.

    python -m zipfile -e ../shared/data/bsds500.zip data
    python tools/bench_boundaries.py --data data/bsds500 --json
    python tools/bench_boundaries.py --data data/bsds500 --split val --prior '{"kind": "edge", "stride": 4}'

`native`: the map of the image with a cell a pixel, not thinned. `stored`: the map of the image at 224 x 224 px, through
its codec, and enlarged to the image's size. Controls are the gradients of Sobel and of smoothed luma (Canny). Tune on
`val`; use `test` last.

A map is thinned, cut at each of a row of thresholds, and matched one to one with each annotator's boundary, pixels no
further apart than `TOLERANCE` (Martin, Fowlkes & Malik 2004; Arbeláez et al. 2011). A boundary pixel of the map is
right if it is matched with anyone's; each annotator's own pixels are to be recalled. ODS is the best F of one threshold
for all images, OIS that of each image's own best.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from dpkd.backends.local_pool import LocalPool
from dpkd.data.images import decode_image
from dpkd.log import Progress
from dpkd.priors import Prior
from dpkd.priors.base import ImageViews
from dpkd.priors.catalogue.edge import Edge, crests
from dpkd.priors.catalogue.kernels import Kernel
from dpkd.priors.record import store_map

Image = NDArray[np.uint8]
Map = NDArray[np.float32]
Mask = NDArray[np.bool_]
Detector = Callable[[Image], Map]
"""A boundary map in [0, 1] of an image, on the image's own grid."""

STORED_PX = 224
TOLERANCE = 0.0075
"""Of the image's diagonal: how far apart matched pixels may be."""
FRAME_PX = 5
"""Left out along the frame, where a gradient sees no further."""
THRESHOLDS = tuple(np.round(np.linspace(0.01, 0.99, 50), 4).tolist())
NOWHERE = -2
"""Marks a drawn pixel from which no augmenting path goes."""


@dataclass(frozen=True)
class Counts:
    """Boundary pixels of one image at each of T thresholds, int64."""

    recalled_T: NDArray[np.int64]
    """Of the annotators' pixels."""
    drawn_T: NDArray[np.int64]
    """By all annotators together."""
    right_T: NDArray[np.int64]
    """Of the map's pixels."""
    found_T: NDArray[np.int64]
    """In the map."""


@dataclass(frozen=True)
class Score:
    """Best F of one threshold for all images, the threshold, and the F of each image's own best threshold."""

    ods: float
    threshold: float
    ois: float
    precision: float
    """At the best threshold, as `recall`."""
    recall: float


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


def gradient(image_HWC: Image, *, sigma: float = 0.0) -> Map:
    """Sobel's gradient of luma; after a Gaussian, as Canny's detector takes it, where `sigma` is not 0."""
    grey_HW = ImageViews(image_HWC).grey_HW
    if sigma:
        grey_HW = np.asarray(cv2.GaussianBlur(grey_HW, (0, 0), sigma), np.float32)
    slope_HW = cv2.magnitude(cv2.Sobel(grey_HW, cv2.CV_32F, 1, 0), cv2.Sobel(grey_HW, cv2.CV_32F, 0, 1))
    return np.sqrt(np.minimum(np.asarray(slope_HW, np.float32) / np.float32(8 * 64), np.float32(1)))


def region_boundary(label_HW: NDArray[np.integer]) -> Mask:
    """Where the region to the right, below, or right below is another one, thinned to lines of one pixel."""
    padded_HW = np.pad(label_HW, ((0, 1), (0, 1)), mode="edge")
    here, right, below, across = label_HW, padded_HW[:-1, 1:], padded_HW[1:, :-1], padded_HW[1:, 1:]
    return _lines((here != right) | (here != below) | (here != across))


def _lines(mask_HW: Mask) -> Mask:
    """The mask thinned to lines of one pixel (Guo & Hall 1989)."""
    byte_HW = mask_HW.astype(np.uint8) * np.uint8(255)
    return np.asarray(cv2.ximgproc.thinning(byte_HW, thinningType=cv2.ximgproc.THINNING_GUOHALL) > 0)


def thin(map_HW: Map) -> Map:
    """The slightly smoothed map where it is a crest (`crests`) and not within `FRAME_PX` of the frame, 0 elsewhere."""
    inside_HW, inside = np.zeros_like(map_HW), np.s_[FRAME_PX:-FRAME_PX, FRAME_PX:-FRAME_PX]
    inside_HW[inside] = crests(map_HW, direction_px=2.0, fine_px=1.0)[inside]
    return inside_HW


def boundary_counts(map_HW: Map, drawn: Sequence[Mask], *, thresholds: Sequence[float] = THRESHOLDS) -> Counts:
    """Counts of a boundary map in [0, 1], thinned here, against each annotator's boundary of the same size."""
    thin_HW = thin(map_HW)
    reach_px = TOLERANCE * float(np.hypot(*map_HW.shape))
    recalled, right, found = [], [], []
    for threshold in thresholds:
        cut_HW = _lines(thin_HW >= threshold)
        matched = [match(cut_HW, drawn_HW, reach_px=reach_px) for drawn_HW in drawn]
        recalled.append(sum(int(matched_HW.sum()) for matched_HW in matched))
        right.append(int(np.logical_or.reduce(matched).sum()))
        found.append(int(cut_HW.sum()))
    total = sum(int(drawn_HW.sum()) for drawn_HW in drawn)
    return Counts(np.array(recalled), np.full(len(thresholds), total), np.array(right), np.array(found))


def boundary_score(images: Sequence[Counts], *, thresholds: Sequence[float] = THRESHOLDS) -> Score:
    """ODS and OIS over images."""
    table = np.array([[counts.recalled_T, counts.drawn_T, counts.right_T, counts.found_T] for counts in images])
    total_4T = table.sum(0)
    f_T, own_NT = _f(total_4T), _f(np.moveaxis(table, 1, 0))
    best, own_best_N = int(f_T.argmax()), own_NT.argmax(1)
    own_4 = table[np.arange(len(images)), :, own_best_N].sum(0)
    recalled, drawn, right, found = total_4T[:, best]
    return Score(
        ods=float(f_T[best]),
        threshold=float(thresholds[best]),
        ois=float(_f(own_4)),
        precision=float(right / max(found, 1)),
        recall=float(recalled / max(drawn, 1)),
    )


def _f(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Harmonic mean of recall and precision along the first axis: recalled, drawn, right, found."""
    recalled, drawn, right, found = counts.astype(np.float64)
    recall, precision = recalled / np.maximum(drawn, 1), right / np.maximum(found, 1)
    return np.asarray(2 * recall * precision / np.maximum(recall + precision, 1e-12))


def match(found_HW: Mask, drawn_HW: Mask, *, reach_px: float) -> Mask:
    """The pixels of `found_HW` in a largest one-to-one matching with `drawn_HW`, no pair further apart than `reach_px`.

    Pairs are first taken nearest first, then lengthened by augmenting paths (Berge 1957) until none is left.
    """
    radius = int(reach_px)
    steps = [(dy * dy + dx * dx, dy, dx) for dy in range(-radius, radius + 1) for dx in range(-radius, radius + 1)]
    offset_K2 = np.array([step[1:] for step in sorted(steps) if step[0] <= reach_px**2], np.int64)
    number_HW = np.full(drawn_HW.shape, -1, np.int64)
    number_HW[drawn_HW] = np.arange(int(drawn_HW.sum()))
    padded_HW = np.pad(number_HW, radius, constant_values=-1)
    matched_HW = np.zeros_like(found_HW)
    matched_HW[found_HW] = _match(np.argwhere(found_HW), padded_HW, offset_K2, radius) >= 0
    return matched_HW


@Kernel
def _match(place_N2, number_HW, offset_K2, radius):  # type: ignore[no-untyped-def]
    """The drawn pixel matched with each found one, -1 without one."""
    num_found, num_drawn = len(place_N2), number_HW.max() + 1
    partner_N, owner_M = np.full(num_found, -1, np.int64), np.full(num_drawn, -1, np.int64)
    for k in range(len(offset_K2)):
        dy, dx = offset_K2[k, 0] + radius, offset_K2[k, 1] + radius
        for i in range(num_found):
            if partner_N[i] < 0:
                j = number_HW[place_N2[i, 0] + dy, place_N2[i, 1] + dx]
                if j >= 0 and owner_M[j] < 0:
                    partner_N[i], owner_M[j] = j, i
    _augment(place_N2, number_HW, offset_K2, radius, partner_N, owner_M)
    return partner_N


@Kernel
def _augment(place_N2, number_HW, offset_K2, radius, partner_N, owner_M):  # type: ignore[no-untyped-def]  # noqa: PLR0917
    """Lengthens a matching by augmenting paths, found breadth first, until there is none.

    What a search without success has seen leads nowhere later either, so each pixel is searched in vain once.
    """
    seen_M, before_M = np.full(len(owner_M), -1, np.int64), np.empty(len(owner_M), np.int64)
    queue = np.empty(len(partner_N), np.int64)
    for root in range(len(partner_N)):
        if partner_N[root] >= 0:
            continue
        queue[0], head, tail, end = root, 0, 1, -1
        while head < tail and end < 0:
            i = queue[head]
            head += 1
            for k in range(len(offset_K2)):
                j = number_HW[place_N2[i, 0] + offset_K2[k, 0] + radius, place_N2[i, 1] + offset_K2[k, 1] + radius]
                if j < 0 or seen_M[j] == root or seen_M[j] == NOWHERE:
                    continue
                seen_M[j], before_M[j] = root, i
                if owner_M[j] < 0:
                    end = j
                    break
                queue[tail] = owner_M[j]
                tail += 1
        for at in range(tail if end < 0 else 0):
            if partner_N[queue[at]] >= 0:
                seen_M[partner_N[queue[at]]] = NOWHERE
        while end >= 0:  # hands each drawn pixel on the path to the found pixel before it
            i = before_M[end]
            following = partner_N[i]
            partner_N[i], owner_M[end] = end, i
            end = following


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Runs the benchmark and prints a row for each detector; returns the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with val/ and test/ of BSDS500")
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--prior", action="append", help="settings as JSON of a prior to measure instead")
    parser.add_argument("--images", type=int, help="only the first so many")
    parser.add_argument("--thresholds", type=int, default=len(THRESHOLDS), help="fewer are faster, F a little lower")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    options = parser.parse_args(arguments)
    folder = Path(options.data) / options.split
    paths = [path for path in sorted(folder.glob("*.jpg")) if list(folder.glob(f"{path.stem}_seg*.png"))]
    if not paths:
        raise SystemExit(f"{folder}: no <id>.jpg with its <id>_seg<k>.png; unpack bsds500.zip and give its folder")
    paths = paths[: options.images]
    thresholds = tuple(np.linspace(THRESHOLDS[0], THRESHOLDS[-1], options.thresholds).tolist())
    rows = []
    for name, detector in _detectors(options.prior or ()).items():
        rows.append(_measure(name, detector, paths, thresholds=thresholds, processes=options.processes))
        if not options.json:
            row = rows[-1]
            print(f"{row['name']:<40} ODS {row['ods']:.4f}  OIS {row['ois']:.4f}  {row['ms']:.2f} ms", flush=True)
    if options.json:
        done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
        head = {"commit": done.stdout.strip(), "date": time.strftime("%Y-%m-%d"), "split": options.split}
        print(json.dumps({**head, "images": len(paths), "rows": rows}, indent=1))
    return rows


def _detectors(texts: Sequence[str]) -> dict[str, Detector]:
    """By name: both ways of each prior that is given as JSON, else the default ones and the controls."""
    try:
        priors: dict[str, Prior] = {text: TypeAdapter(Prior).validate_json(text) for text in texts}
    except ValidationError as error:
        raise SystemExit(f"--prior {' '.join(texts)}: {error}") from error
    if priors:
        ways: tuple[Callable[[Any, Image], Map], ...] = (native, stored)
        return {f"{text}, {way.__name__}": partial(way, prior) for text, prior in priors.items() for way in ways}
    return {
        "Sobel": gradient,
        "Gaussian gradient of luma": partial(gradient, sigma=2.0),
        "edge, native": partial(native, Edge()),
        "edge, stored": partial(stored, Edge()),
        "edge, not thinned, stored": partial(stored, Edge(thin=False)),
    }


def _measure(
    name: str, detector: Detector, paths: list[Path], *, thresholds: tuple[float, ...], processes: int
) -> dict[str, Any]:
    counts: dict[int, tuple[Counts, float]] = {}
    with Progress(name, len(paths), shown=sys.stderr.isatty()) as progress:
        for i, result in LocalPool(processes).map(partial(_count, detector, thresholds), paths):
            counts[i] = result
            progress.advance()
    score = boundary_score([counts[i][0] for i in range(len(paths))], thresholds=thresholds)
    ms = 1e3 * float(np.median([seconds for _, seconds in counts.values()]))
    return {"name": name, **{key: round(value, 4) for key, value in vars(score).items()}, "ms": round(ms, 3)}


def _count(detector: Detector, thresholds: tuple[float, ...], path: Path) -> tuple[Counts, float]:
    """The counts of one image, and the CPU seconds of its map, the second time that it is drawn."""
    cv2.setNumThreads(1)
    image_HWC = decode_image(path.read_bytes())
    drawn = [
        region_boundary(np.asarray(cv2.imread(str(mask), cv2.IMREAD_UNCHANGED), np.int64))
        for mask in sorted(path.parent.glob(f"{path.stem}_seg*.png"))
    ]
    detector(image_HWC)
    start_s = time.process_time()
    map_HW = detector(image_HWC)
    taken_s = time.process_time() - start_s
    return boundary_counts(map_HW, drawn, thresholds=thresholds), taken_s


if __name__ == "__main__":
    main()
