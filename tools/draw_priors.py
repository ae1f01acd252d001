"""Draws every built-in prior on three photographs: docs/priors.png.

    python tools/draw_priors.py docs/priors.png

The photographs come with scikit-image: an astronaut (NASA, public domain), a cat and a cup of coffee (CC0). They go
through `pack`, `prepare` and `dpkd inspect --picture`, as anyone's would.
"""

import argparse
import tempfile
from pathlib import Path

import cv2
import numpy as np
from skimage import data

from dpkd.backends.local_pool import LocalPool
from dpkd.data.settings import FolderSource
from dpkd.priors import DEFAULT_PRIORS, Glcm, Hog, Hue, Symmetry
from dpkd.report.quarantine import Quarantine
from dpkd.settings import DataSettings, PrepareSettings
from dpkd.stages.pack import pack
from dpkd.stages.prepare import prepare
from dpkd.verbs.inspect import inspect

SIZE_PX = 224


def main(arguments: list[str] | None = None) -> None:
    """Draws the picture to the path that is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path, help="where the PNG goes")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for title, image_HWC in (("astronaut", data.astronaut()), ("cat", data.chelsea()), ("coffee", data.coffee())):
            _write(folder / "images/train/photo" / f"{title}.png", np.asarray(image_HWC, np.uint8))
        settings = DataSettings(source=FolderSource(path=str(folder / "images")))
        quarantine = Quarantine(folder / "quarantine.jsonl", limit=0)
        shards = str(folder / "shards")
        dataset = pack(settings, shards, seed=0, pool=LocalPool(1), quarantine=quarantine, progress=lambda *_: None)
        priors = PrepareSettings(priors=(*DEFAULT_PRIORS, Hog(), Hue(), Symmetry(), Glcm()))
        prepare(dataset, priors, pool=LocalPool(1), quarantine=quarantine, progress=lambda *_: None)
        inspect(shards, picture=options.picture, keys=dataset.split("train").keys)


def _write(path: Path, image_HWC: np.ndarray) -> None:
    """The middle square of the image, at the size that is drawn."""
    height, width = image_HWC.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square_HWC = image_HWC[top : top + side, left : left + side]
    path.parent.mkdir(parents=True, exist_ok=True)
    small_HWC = cv2.resize(square_HWC, (SIZE_PX, SIZE_PX), interpolation=cv2.INTER_AREA)
    cv2.imwrite(str(path), cv2.cvtColor(small_HWC, cv2.COLOR_RGB2BGR))


if __name__ == "__main__":
    main()
