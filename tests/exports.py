"""Small exported students, and noisy images of one colour a class."""

from pathlib import Path

import numpy as np
from PIL import Image

from dpkd.data.settings import Window
from dpkd.models.network import build_network
from dpkd.models.settings import ModelSettings, NetworkSpec
from dpkd.stages.export import write_timm_folder

COLOURS = {"red": (200, 40, 40), "green": (40, 190, 50), "blue": (40, 50, 200), "grey": (120, 120, 120)}


def write_export(
    folder: Path, *, classes: tuple[str, ...] = ("a", "b"), seed: int = 3, window: Window | None = None
) -> Path:
    """An untrained student for 32 px images, exported."""
    folder.mkdir(parents=True)
    model = ModelSettings(name="resnet10t", arguments={"stem_width": 8, "channels": [16, 16, 32, 32]})
    spec = NetworkSpec(model=model, classes=classes, image_size=32, mean=(0.5, 0.4, 0.5), std=(0.2, 0.3, 0.2))
    write_timm_folder(folder, build_network(spec, seed=seed).eval(), window=window)
    return folder


def make_shots(folder: Path, counts: dict[str, int], *, first: int = 0) -> Path:
    """Images of 40 x 32 pixels in class folders."""
    for number, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for i in range(first, first + count):
            noise = np.random.default_rng([number, i]).normal(0, 60, (32, 40, 3))
            pixels = np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder
