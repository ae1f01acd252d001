"""The drawn data set: the same every time, with masks that fit, and with splits that share no class."""

from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

from dpkd.data.attributes import read_attributes
from tools.make_sample_data import (
    OUTLINES,
    TEXTURES,
    Appearance,
    SampleSettings,
    appearances,
    describe,
    draw,
    draw_samples,
)

TINY = SampleSettings(
    size=32, base_classes=3, val_classes=2, novel_classes=2, largest=6, smallest=2, evaluation=2, unlabelled=4
)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_same_seed_draws_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        draw_samples(tmp_path / name, settings=TINY, seed=seed)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert files(tmp_path / "a") != files(tmp_path / "c")


def test_counts_of_base_fall_off_and_every_image_has_its_mask(tmp_path: Path) -> None:
    number = draw_samples(tmp_path, settings=TINY, seed=0)
    images = list(tmp_path.rglob("*.jpg"))
    assert len(images) == number
    assert all(path.with_suffix(".mask.png").is_file() for path in images)
    counts = Counter(path.parent.name for path in images if path.parts[-3] == "base")
    assert sorted(counts.values()) == [2, 3, 4, 6]
    assert counts["unlabelled"] == 4


def test_the_description_says_how_each_class_is_drawn(tmp_path: Path) -> None:
    draw_samples(tmp_path, settings=TINY, seed=0)
    table = read_attributes(str(tmp_path / "attributes.yaml"))
    folders = {path.parent.name for path in tmp_path.rglob("*.jpg")}
    assert set(table.classes) == folders - {"unlabelled"}
    for name, known in table.known().items():
        holds = {attribute.partition("=")[2] for attribute, value in known.items() if "=" in attribute and value == 1}
        assert holds == set(name.split("-"))
        assert 0 < known["roundness"] <= 1
        assert 0 < known["solidity"] <= 1


def test_a_disc_is_round_a_square_solid_and_a_ring_hollow(tmp_path: Path) -> None:
    (tmp_path / "table.yaml").write_text(describe(Appearance("red", "plain", shape) for shape in OUTLINES))
    known = {
        name.rpartition("-")[2]: row for name, row in read_attributes(str(tmp_path / "table.yaml")).known().items()
    }
    assert known["disc"]["roundness"] > 0.99 < known["disc"]["solidity"]
    assert known["square"]["roundness"] == pytest.approx(np.pi / 4, abs=0.01)
    assert known["ring"]["solidity"] == pytest.approx(1 - (0.5 / 0.95) ** 2, abs=0.01)
    assert known["star"]["solidity"] < known["arrow"]["solidity"] < known["square"]["solidity"]


def test_no_class_is_in_two_splits() -> None:
    chosen = appearances(SampleSettings(), seed=0)
    every = [appearance for members in chosen.values() for appearance in members]
    assert len(every) == len(set(every))
    assert {a.shape for a in chosen["novel"]} <= {a.shape for a in chosen["base"]}


@pytest.mark.parametrize("shape", sorted(OUTLINES))
def test_the_mask_covers_the_object_and_little_else(shape: str) -> None:
    for seed, texture in enumerate(TEXTURES):
        image, mask = draw(Appearance("red", texture, shape), rng=np.random.default_rng(seed), size=64)
        assert image.shape == (64, 64, 3)
        assert set(np.unique(mask)) == {0, 255}
        assert 0.03 < (mask > 0).mean() < 0.6
        hue = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)[..., 0].astype(int)
        red = np.minimum(hue, 180 - hue) < 16
        assert red[mask > 0].mean() > 0.7 > red[mask == 0].mean()
