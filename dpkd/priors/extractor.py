"""What every prior can do, and the few things that several of them need: a fingerprint, the grid, a mirror."""

import hashlib
from functools import lru_cache
from typing import Protocol

import numpy as np

from dpkd.priors.codecs import Codec, Map
from dpkd.priors.picture import Picture


class Extractor(Protocol):
    """One kind of prior knowledge with its settings: a frozen settings model with a `kind` and these verbs."""

    @property
    def kind(self) -> str:
        """Names the class in settings."""

    @property
    def name(self) -> str:
        """Names the map in a prior set."""

    @property
    def version(self) -> int:
        """Version of the code, to be raised whenever the same settings come to give another map."""

    @property
    def channels(self) -> int:
        """Channels of the map."""

    @property
    def nearest(self) -> bool:
        """Whether values are labels, so that resampling must take the nearest one."""

    @property
    def codec(self) -> Codec:
        """How the map is stored."""

    def map(self, picture: Picture) -> Map:
        """The map of an image of any size, on a grid that covers the whole image."""

    def flip(self, map_HWC: Map) -> Map:
        """The map of the image mirrored left to right."""

    def model_dump_json(self) -> str:
        """The settings as JSON."""

    def __hash__(self) -> int: ...


@lru_cache(maxsize=256)
def fingerprint(prior: Extractor) -> str:
    """Identifies what `prior` computes, by its settings and code version; 16 hex digits."""
    return hashlib.sha256(f"{prior.model_dump_json()} version {prior.version}".encode()).hexdigest()[:16]


def grid_size(picture: Picture, stride: int) -> tuple[int, int]:
    """Height and width of the grid that has a cell about every `stride` pixels, at least one."""
    height, width = picture.size
    return max(1, round(height / stride)), max(1, round(width / stride))


def mirror(map_HWC: Map) -> Map:
    """The map mirrored left to right, its values unchanged."""
    return np.ascontiguousarray(map_HWC[:, ::-1])
