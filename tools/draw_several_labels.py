"""Draws images with several objects each, and a table with a column a shape: for runs with several labels an image.

Some shapes are frequent and some rare; a cell in twenty is empty, as where nobody looked.

    <folder>/00000.jpg, …                      64 px
    <folder>/images.csv                        path, and 1, 0 or an empty cell for each shape

    python -m tools.draw_several_labels data/several
"""

import argparse
import csv
from pathlib import Path

import cv2
import numpy as np

from tools.make_sample_data import HUES, OUTLINES, TEXTURES, Appearance, draw

SIZE, OBJECT_SIZE = 64, 32
NUM_IMAGES = 2000
SHARES = np.geomspace(0.5, 0.02, len(OUTLINES))
"""Share of the images with each shape."""
UNKNOWN = 0.05


def draw_images(folder: Path, *, num_images: int, seed: int) -> None:
    """Draws the images and the table into `folder`, which must not exist."""
    folder.mkdir(parents=True)
    rows = []
    for number in range(num_images):
        rng = np.random.default_rng([seed, number])
        has_K = rng.random(len(OUTLINES)) < SHARES
        plain = Appearance(str(rng.choice(list(HUES))), "plain", "disc")
        image_HWC = cv2.GaussianBlur(draw(plain, rng=rng, size=SIZE)[0], (0, 0), 6)  # a ground without an object
        for shape in np.array(list(OUTLINES))[has_K]:
            look = Appearance(str(rng.choice(list(HUES))), str(rng.choice(TEXTURES)), str(shape))
            object_HWC, mask_HW = draw(look, rng=rng, size=OBJECT_SIZE)
            top, left = rng.integers(0, SIZE - OBJECT_SIZE + 1, 2)
            place = image_HWC[top : top + OBJECT_SIZE, left : left + OBJECT_SIZE]
            place[mask_HW > 0] = object_HWC[mask_HW > 0]
        path = f"{number:05d}.jpg"
        cv2.imwrite(str(folder / path), image_HWC, [cv2.IMWRITE_JPEG_QUALITY, 92])
        cells = np.where(rng.random(len(OUTLINES)) < UNKNOWN, "", has_K.astype(int).astype(str))
        rows.append({"path": path, **dict(zip(OUTLINES, cells.tolist(), strict=True))})
    with (folder / "images.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=NUM_IMAGES)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw_images(options.folder, num_images=options.images, seed=options.seed)
    print(f"drew {options.images} images and images.csv at {options.folder}")
