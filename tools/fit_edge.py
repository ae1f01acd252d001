"""Fits the weights of the edge prior's cues to boundaries that people drew: see dpkd/priors/catalogue/edge.py.

    python -m zipfile -e ../shared/data/bsds500.zip data
    python tools/fit_edge.py --data data/bsds500

Logistic regression on places of the images of `val`, each image at its own size and at 224 x 224 px: half of the places
on crests of the gradient along lines, half anywhere. A place counts as a boundary by the share of annotators who drew
one within 2.5 px. `--fold 0` and `1` leave every second image out, to be looked at instead.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from dpkd.data.images import decode_image
from dpkd.priors.base import ImageViews
from dpkd.priors.catalogue.edge import FLOOR, crests, enlarged, levels
from tools.bench_boundaries import region_boundary

Image = NDArray[np.uint8]
Table = NDArray[np.float32]
REACH_PX = 2.5
SIZES = ((None, 4000), (224, 2000))
"""Side to which an image is resized, and places that are taken of it."""


def main(arguments: list[str] | None = None) -> tuple[float, tuple[dict[str, float], ...]]:
    """Prints and returns the bias and the weights by level."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with val/ of BSDS500")
    parser.add_argument("--fold", type=int, choices=(0, 1), help="leave out every second image from this one on")
    options = parser.parse_args(arguments)
    paths = sorted((Path(options.data) / "val").glob("*.jpg"))
    if not paths:
        raise SystemExit(f"{options.data}/val: no <id>.jpg there; unpack bsds500.zip and give its folder")
    if options.fold is not None:
        paths = paths[1 - options.fold :: 2]
    random = np.random.default_rng(0)
    names: list[tuple[int, str]] = []
    tables = []
    for path in paths:
        for names, table in _tables(path, random):  # noqa: B007 (the names are the same each time)
            tables.append(table)
    table_NC = np.concatenate(tables)
    weights_C, bias = _regression(table_NC[:, :-1], table_NC[:, -1])
    weights: tuple[dict[str, float], ...] = ({}, {}, {}, {})
    for (level, name), weight in zip(names, weights_C, strict=True):
        weights[level][name] = round(float(weight), 3)
    print(f"BIAS = {bias:.3f}\nWEIGHTS: tuple[dict[str, float], ...] = {weights}")
    return bias, weights


def _tables(path: Path, random: np.random.Generator) -> Iterator[tuple[list[tuple[int, str]], Table]]:
    """Names of the cues, and a row for each place: logarithms of its cues, and the share who drew a boundary there."""
    image_HWC = decode_image(path.read_bytes())
    share_HW = _drawn_share(path)
    for side, num_places in SIZES:
        seen_HWC = image_HWC if side is None else cv2.resize(image_HWC, (side, side), interpolation=cv2.INTER_AREA)
        found = levels(ImageViews(np.asarray(seen_HWC, np.uint8)))
        size = found[0]["line"].shape
        names = [(level, name) for level, cues in enumerate(found) for name in cues]
        said = [enlarged(np.log(found[level][name] + FLOOR), size) for level, name in names]
        said.append(enlarged(share_HW, size))
        y_N, x_N = _places(found[0]["line"], num_places, random)
        yield names, np.stack([each_HW[y_N, x_N] for each_HW in said], axis=1)


def _drawn_share(path: Path) -> Table:
    """The share of annotators who drew a boundary within `REACH_PX` of each pixel."""
    near = []
    for drawn in sorted(path.parent.glob(f"{path.stem}_seg*.png")):
        boundary_HW = region_boundary(np.asarray(cv2.imread(str(drawn), cv2.IMREAD_UNCHANGED), np.int64))
        away_HW = cv2.distanceTransform((~boundary_HW).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        near.append(away_HW <= REACH_PX)
    return np.mean(near, axis=0, dtype=np.float32)


def _places(line_HW: Table, number: int, random: np.random.Generator) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Half of the places on crests, half anywhere, none at the frame."""
    height, width = line_HW.shape
    crest_HW = crests(line_HW, direction_px=2.0, fine_px=1.0) > 0
    crest_HW[:3] = crest_HW[-3:] = crest_HW[:, :3] = crest_HW[:, -3:] = False
    y_N, x_N = np.nonzero(crest_HW)
    some = random.permutation(len(y_N))[: number // 2]
    anywhere = random.integers(3, (height - 3, width - 3), (number // 2, 2))
    return np.concatenate([y_N[some], anywhere[:, 0]]), np.concatenate([x_N[some], anywhere[:, 1]])


def _regression(said_NC: Table, share_N: Table) -> tuple[NDArray[np.float64], float]:
    """Weights and bias that make the shares likeliest."""
    both_NC, drawn_N = np.concatenate([said_NC, said_NC]), np.repeat([1, 0], len(share_N))
    model = LogisticRegression(C=1.0, max_iter=1000, tol=1e-6)
    model.fit(both_NC, drawn_N, sample_weight=np.concatenate([share_N, 1 - share_N]))
    return model.coef_[0], float(model.intercept_[0])


if __name__ == "__main__":
    main()
