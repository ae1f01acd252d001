"""Draws a small data set: objects on cluttered grounds, with masks; the same settings and seed give the same images.

A class is a combination of shape, colour and texture, so that no single one of them tells it; each of the three recurs
in other classes, seen and unseen, so that what is learnt on `base` helps on `novel`. The counts of `base` fall off
geometrically (a long tail), and further images there carry no label.

    <folder>/base/<colour>-<texture>-<shape>/00000.jpg, 00000.mask.png      many of the first class, few of the last
    <folder>/base/unlabelled/…                                              combinations of base and of no split
    <folder>/{val,novel}/<colour>-<texture>-<shape>/…                       other combinations, balanced
    <folder>/attributes.yaml                                                what a describer says of each class
    <folder>.json                                                           settings and seed, written last

    python tools/make_sample_data.py data/sample
"""

import argparse
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
Floats = NDArray[np.floating[Any]]

VERSION = 1
SPLITS = ("base", "val", "novel")
OVERSAMPLING = 2
HUES = {"red": 0, "yellow": 28, "green": 62, "blue": 108, "violet": 143}  # OpenCV degrees, 0 to 180
TEXTURES = ("plain", "striped", "checked", "dotted", "ringed")


@dataclass(frozen=True)
class SampleSettings:
    """How many classes and images are drawn, and how large."""

    size: int = 64
    base_classes: int = 20
    val_classes: int = 8
    novel_classes: int = 12
    largest: int = 90
    """Images of the most frequent base class."""
    smallest: int = 12
    """Images of the rarest base class."""
    evaluation: int = 40
    """Images of each val and novel class."""
    unlabelled: int = 400


@dataclass(frozen=True)
class Appearance:
    """What defines a class."""

    colour: str
    texture: str
    shape: str

    @property
    def name(self) -> str:
        """The class name, also its folder."""
        return f"{self.colour}-{self.texture}-{self.shape}"


def _polar(radii: NDArray[np.float64]) -> NDArray[np.float64]:
    """Corner points at equal angles with these radii."""
    angle = np.arange(len(radii)) * (2 * np.pi / len(radii))
    return np.stack([np.cos(angle) * radii, np.sin(angle) * radii], axis=1)


def _crescent() -> NDArray[np.float64]:
    outer = np.linspace(0.25 * np.pi, 1.75 * np.pi, 40)
    inner = outer[::-1]
    edges = (np.cos(outer), np.sin(outer)), (0.35 + 0.75 * np.cos(inner), 0.82 * np.sin(inner))
    return np.concatenate([np.stack(edge, axis=1) for edge in edges])


def _outlines() -> dict[str, list[NDArray[np.float64]]]:
    """Each shape as closed outlines within the unit circle; a second outline cuts a hole."""
    star = np.where(np.arange(10) % 2, 0.42, 1.0)
    arm = 0.36
    quarter = np.array([(arm, -1), (arm, -arm), (1, -arm)])
    turns = [np.array([[c, s], [-s, c]]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]
    head, shaft = np.array([(0.05, 0.85), (1, 0), (0.05, -0.85)]), np.array([(-1, 0.3), (0.05, 0.3)])
    return {
        "disc": [_polar(np.full(48, 0.85))],
        "square": [_polar(np.full(4, 1.1))],
        "triangle": [_polar(np.full(3, 1.1))],
        "star": [_polar(star * 1.1)],
        "cross": [np.concatenate([quarter @ turn for turn in turns])],
        "ring": [_polar(np.full(48, 0.95)), _polar(np.full(48, 0.5))],
        "crescent": [_crescent()],
        "arrow": [np.concatenate([shaft, head, shaft[::-1] * [1, -1]])],
    }


OUTLINES = _outlines()


def appearances(settings: SampleSettings, *, seed: int) -> dict[str, list[Appearance]]:
    """Combinations for each split, none twice, every colour, texture and shape about equally often in each split.

    The rest, which no split holds, comes under "other".
    """
    rng = np.random.default_rng([seed, VERSION])
    left = [Appearance(c, t, s) for c in HUES for t in TEXTURES for s in OUTLINES]
    wanted = {"base": settings.base_classes, "val": settings.val_classes, "novel": settings.novel_classes}
    if sum(wanted.values()) > len(left):
        raise ValueError(
            f"{sum(wanted.values())} classes asked for, but there are {len(left)} combinations: ask for fewer"
        )
    chosen: dict[str, list[Appearance]] = {}
    for split, count in wanted.items():
        used: Counter[str] = Counter()
        chosen[split] = []
        for _ in range(count):
            order = rng.permutation(len(left))
            cost = [used[left[i].colour] / 8 + used[left[i].texture] / 8 + used[left[i].shape] / 5 for i in order]
            pick = left.pop(int(order[int(np.argmin(cost))]))
            used.update([pick.colour, pick.texture, pick.shape])
            chosen[split].append(pick)
    return {**chosen, "other": left}


def long_tail(num_classes: int, *, largest: int, smallest: int) -> list[int]:
    """Counts that fall off geometrically from the largest to the smallest."""
    return [round(c) for c in np.geomspace(largest, smallest, num_classes)]


def describe(classes: Iterable[Appearance]) -> str:
    """A table of attributes (`dpkd/data/attributes.py`) that says of each class how it is drawn.

    Roundness is 4πA/P² of the outer outline, solidity the share of its convex hull that the shape fills.
    """
    options = {"colour": HUES, "texture": TEXTURES, "shape": OUTLINES}
    lines = ["attributes:"]
    lines += [f"  {name}: {{one_of: [{', '.join(each)}]}}" for name, each in options.items()]
    lines += ["  roundness: graded", "  solidity: graded", "classes:"]
    for each in classes:
        outer, *holes = (outline.astype(np.float32) for outline in OUTLINES[each.shape])
        area = cv2.contourArea(outer)
        roundness = 4 * np.pi * area / cv2.arcLength(outer, closed=True) ** 2
        solidity = (area - sum(cv2.contourArea(hole) for hole in holes)) / cv2.contourArea(cv2.convexHull(outer))
        drawn = f"colour: {each.colour}, texture: {each.texture}, shape: {each.shape}"
        lines.append(f"  {each.name}: {{{drawn}, roundness: {roundness:.2f}, solidity: {solidity:.2f}}}")
    return "\n".join(lines) + "\n"


def _colour(hue: float, saturation: float, value: float) -> Floats:
    """An HSV colour (hue in OpenCV degrees, the others in 0..1) as BGR in 0..255."""
    pixel = np.array([[[hue % 180, saturation * 255, value * 255]]], np.uint8)
    return cv2.cvtColor(pixel, cv2.COLOR_HSV2BGR)[0, 0].astype(np.float32)


def _ground(rng: np.random.Generator, side: int) -> Floats:
    """A smooth, many-coloured ground, covered with small pieces in every colour and some grain."""
    coarse = rng.uniform(40, 215, (rng.integers(2, 6), rng.integers(2, 6), 3)).astype(np.float32)
    image = cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)
    for _ in range(rng.integers(8, 22)):
        colour = _colour(rng.uniform(0, 180), rng.uniform(0.2, 0.9), rng.uniform(0.25, 0.95)).tolist()
        start = rng.uniform(0, side, 2)
        if rng.random() < 0.45:
            end = start + rng.uniform(-0.4, 0.4, 2) * side
            ends = start.astype(int).tolist(), end.astype(int).tolist()
            cv2.line(image, *ends, colour, int(rng.integers(1, 5)), cv2.LINE_AA)
        else:
            corners = start + _polar(rng.uniform(0.03, 0.12, rng.integers(3, 8))) * side
            cv2.fillPoly(image, [corners.astype(np.int32)], colour, cv2.LINE_AA)
    return (image + rng.normal(0, 10, (side, side, 1))).astype(np.float32)


def _pattern(texture: str, u: Floats, v: Floats) -> Floats:
    """The texture at object coordinates (u, v), in 0..1: how much of the second tone shows."""
    waves: dict[str, Callable[[], Floats]] = {
        "plain": lambda: np.full_like(u, -1),
        "striped": lambda: np.sin(u),
        "checked": lambda: np.sin(u) * np.sin(v) * 2,
        "dotted": lambda: np.cos(u) + np.cos(v) - 0.8,
        "ringed": lambda: np.sin(np.hypot(u, v)),
    }
    return np.clip(waves[texture]() * 3 + 0.5, 0, 1)


def draw(appearance: Appearance, *, rng: np.random.Generator, size: int) -> tuple[Image, Image]:
    """One image (BGR, uint8) of an object of this appearance, and its mask (255 on the visible object)."""
    side = size * OVERSAMPLING
    angle, radius, squeeze = rng.uniform(0, 2 * np.pi), rng.uniform(0.23, 0.42) * side, rng.uniform(0.75, 1.0)
    centre = side / 2 + rng.uniform(-1, 1, 2) * (side * 0.52 - radius)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    outlines = [(o * [1, squeeze] @ turn.T * radius + centre).round() for o in OUTLINES[appearance.shape]]
    mask = np.zeros((side, side), np.uint8)
    cv2.fillPoly(mask, [o.astype(np.int32) for o in outlines], 255)
    figure = _figure(appearance, rng=rng, side=side, turn=turn / radius, centre=centre)

    image = np.where(mask[..., None] > 0, figure, _ground(rng, side)).astype(np.float32)
    _occlude(image, mask, rng=rng)
    image += rng.normal(0, 8, image.shape).astype(np.float32)
    small = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
    small_mask = cv2.resize(mask, (size, size), interpolation=cv2.INTER_AREA)
    return np.clip(small, 0, 255).astype(np.uint8), np.where(small_mask > 127, 255, 0).astype(np.uint8)


def _figure(
    appearance: Appearance,
    *,
    rng: np.random.Generator,
    side: int,
    turn: NDArray[np.float64],
    centre: NDArray[np.float64],
) -> Floats:
    """The object's surface over the whole image: its two tones, in its pattern, under light from one side."""
    y, x = np.mgrid[:side, :side]
    along, across = (np.stack([x - centre[0], y - centre[1]], axis=-1) @ turn).astype(np.float32).transpose(2, 0, 1)
    frequency = rng.uniform(11, 16)
    pattern = _pattern(appearance.texture, along * frequency, across * frequency)[..., None]
    hue = HUES[appearance.colour] + rng.uniform(-8, 8)
    saturation, value = rng.uniform(0.45, 0.95), rng.uniform(0.55, 0.95)
    tones = _colour(hue, saturation, value), _colour(hue, saturation * 0.8, value * rng.uniform(0.3, 0.5))
    light = 1 + rng.uniform(-0.3, 0.3) * along[..., None]
    return (tones[0] * (1 - pattern) + tones[1] * pattern) * light


def _occlude(image: Floats, mask: Image, *, rng: np.random.Generator) -> None:
    """Lays a few thin bars across the image, over the object too."""
    side = len(mask)
    for _ in range(rng.integers(0, 4)):
        start, end = (rng.uniform(0, side, 2).astype(int).tolist() for _ in range(2))
        width = int(rng.integers(2, 6))
        colour = _colour(rng.uniform(0, 180), 0.5, rng.uniform(0.2, 0.9)).tolist()
        cv2.line(image, start, end, colour, width, cv2.LINE_AA)
        cv2.line(mask, start, end, 0, width)


def _plan(settings: SampleSettings, *, seed: int) -> Iterator[tuple[str, str, list[Appearance]]]:
    """Yields (split, class folder, the appearance of each image in it)."""
    chosen = appearances(settings, seed=seed)
    counts = long_tail(settings.base_classes, largest=settings.largest, smallest=settings.smallest)
    for appearance, count in zip(chosen["base"], counts, strict=True):
        yield "base", appearance.name, [appearance] * count
    if settings.unlabelled:
        rng = np.random.default_rng([seed, VERSION, 1])
        pools = chosen["base"], chosen["other"] or chosen["base"]
        yield "base", "unlabelled", [pools[i % 2][rng.integers(len(pools[i % 2]))] for i in range(settings.unlabelled)]
    for split in SPLITS[1:]:
        for appearance in chosen[split]:
            yield split, appearance.name, [appearance] * settings.evaluation


def draw_samples(folder: Path, *, settings: SampleSettings, seed: int) -> int:
    """Draws the data set into `folder`, which must not exist or be empty; returns the number of images."""
    num_images = 0
    for number, (split, name, members) in enumerate(_plan(settings, seed=seed)):
        place = folder / split / name
        place.mkdir(parents=True)
        for index, appearance in enumerate(members):
            rng = np.random.default_rng([seed, VERSION, 2, number, index])
            image, mask = draw(appearance, rng=rng, size=settings.size)
            cv2.imwrite(str(place / f"{index:05d}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 92])
            cv2.imwrite(str(place / f"{index:05d}.mask.png"), mask)
        num_images += len(members)
    write_description(folder, settings=settings, seed=seed)
    return num_images


def write_description(folder: Path, *, settings: SampleSettings, seed: int) -> None:
    """Writes `attributes.yaml` into the folder: the classes of all splits."""
    chosen = appearances(settings, seed=seed)
    (folder / "attributes.yaml").write_text(describe(each for split in SPLITS for each in chosen[split]))


def main() -> None:
    """Draws into a folder beside, renames it at the end; a folder drawn with the same settings is kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    for field in fields(SampleSettings):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    arguments = vars(parser.parse_args())
    folder, seed = arguments.pop("folder"), arguments.pop("seed")
    settings = SampleSettings(**arguments)
    record = folder.with_name(f"{folder.name}.json")
    stands = {"version": VERSION, "seed": seed, **asdict(settings)}
    if folder.is_dir() and record.is_file() and json.loads(record.read_text()) == stands:
        write_description(folder, settings=settings, seed=seed)
        print(f"sample data stands at {folder}")
        return
    if folder.exists() and not record.is_file():
        parser.exit(2, f"{folder} exists and was not drawn by this tool: name another folder, or remove it\n")
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    for old in (unfinished, folder):
        shutil.rmtree(old, ignore_errors=True)
    num_images = draw_samples(unfinished, settings=settings, seed=seed)
    unfinished.rename(folder)
    record.write_text(json.dumps(stands, indent=1) + "\n")
    print(f"drew {num_images} images with masks at {folder}")


if __name__ == "__main__":
    main()
