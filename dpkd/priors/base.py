"""The interface of priors, the image as their input, and functions of several priors: fingerprint, grid, mirror."""

import ctypes
import hashlib
import platform
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, cached_property, lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self, TypeVar, runtime_checkable

import cv2
import numpy as np
import numpy.typing as npt

from dpkd.config import Config
from dpkd.priors.codecs import Codec, Map

Value = TypeVar("Value", np.uint8, np.float32)

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 256 * 2**20
"""Freed memory that a process keeps for the next images."""


class ImageViews:
    """An RGB image with read-only views for several priors; each view is computed at first use."""

    def __init__(self, rgb_HWC: npt.NDArray[np.uint8], *, given: Mapping[str, bytes] | None = None) -> None:
        self.rgb_HWC = _locked(rgb_HWC)
        self.given: Mapping[str, bytes] = given or {}
        """The sample's expert maps: image files by name; the mask of figure and ground is "mask"."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = self.rgb_HWC.shape[:2]
        return height, width

    @cached_property
    def half_lab_HWC(self) -> npt.NDArray[np.float32]:  # noqa: N802 (the axes)
        """`lab` of the image at half size."""
        return _locked(lab(halved(self.rgb_HWC)))

    @cached_property
    def grey8_HW(self) -> npt.NDArray[np.uint8]:  # noqa: N802
        """Luma as uint8."""
        return _locked(np.asarray(cv2.cvtColor(self.rgb_HWC, cv2.COLOR_RGB2GRAY), np.uint8))

    @cached_property
    def grey_HW(self) -> npt.NDArray[np.float32]:  # noqa: N802
        """Luma from 0 to 255, float32."""
        return _locked(self.grey8_HW.astype(np.float32))


def halved(image: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Means over 2 x 2 cells, HW or HWC, of the same type; an odd side is rounded."""
    height, width = image.shape[:2]
    size = (max(1, round(width / 2)), max(1, round(height / 2)))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), image.dtype)


def lab(rgb_HWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """CIE L*a*b*, float32: L from 0 to 100."""
    unit_HWC = rgb_HWC.astype(np.float32) * np.float32(1 / 255)
    return np.asarray(cv2.cvtColor(unit_HWC, cv2.COLOR_RGB2Lab), np.float32)


def _locked(array: npt.NDArray[Value]) -> npt.NDArray[Value]:
    """A read-only view of the array."""
    view = array.view()
    view.flags.writeable = False
    return view


class PriorConfig(Config):
    """One kind of prior: a frozen settings model that computes a map of an image.

    A subclass has a `kind`, `channels`, `codec` and `map`. By default the map is named by the kind, has amounts, and is
    mirrored with the image.
    """

    kind: str
    """Name of the class in settings."""
    version: ClassVar[int] = 1
    """Version of the code; increase it if the same settings give another map."""
    nearest: ClassVar[bool] = False
    """True if values are labels, so that resampling must use the nearest value."""
    unknown: ClassVar[float] = 0.5
    """The value of the map of a sample for which it cannot be computed."""

    if TYPE_CHECKING:  # a subclass has them as class variables, fields or properties

        @property
        @abstractmethod
        def channels(self) -> int:
            """Number of channels of the map."""

        @property
        @abstractmethod
        def codec(self) -> Codec:
            """The storage format of the map."""

        @abstractmethod
        def map(self, image: ImageViews) -> Map:
            """The map of an image of any size, HWC, on a grid that covers the whole image: float32, or int32 labels."""

    @property
    def name(self) -> str:
        """Name of the map in a prior set."""
        return self.kind.rpartition(":")[2].lower()

    def flip(self, map_HWC: Map) -> Map:
        """The map of the image mirrored left to right."""
        return mirror(map_HWC)


@runtime_checkable
class BatchExtractor(Protocol):
    """A prior that processes several images at a time, on an accelerator if the machine has one: a network."""

    @property
    def device(self) -> Literal["accelerator", "cpu"]:
        """The device for `maps`; `accelerator` is a GPU, or the CPU of a machine without one."""

    @property
    def batch_size(self) -> int:
        """Maximum number of images for `maps`; the images of one batch are consecutive in a shard."""

    def sealed(self) -> Self:
        """The same prior with the checksum of its files, such as weights; raises `UserError` without them."""

    def identity(self) -> str:
        """Everything that determines the maps of a sealed prior; the fingerprint hashes it, not the settings."""

    def maps(self, images: Sequence[ImageViews], *, device: str) -> list[Map]:
        """The map of each image, computed on a torch device; a map that is not finite marks its image as bad.

        An error stops the stage, so a fault of one image must appear in its map.
        """


def accelerated(priors: Iterable[PriorConfig]) -> tuple[PriorConfig, ...]:
    """The priors that run on an accelerator if the machine has one."""
    return tuple(prior for prior in priors if isinstance(prior, BatchExtractor) and prior.device == "accelerator")


@lru_cache(maxsize=256)
def fingerprint(prior: PriorConfig) -> str:
    """A hash of the settings and code version of `prior`; 16 hex digits."""
    settings = prior.identity() if isinstance(prior, BatchExtractor) else prior.model_dump_json()
    return hashlib.sha256(f"{settings} version {prior.version}".encode()).hexdigest()[:16]


def grid_size(image: ImageViews, stride: int) -> tuple[int, int]:
    """Height and width of the grid with about one cell per `stride` pixels, at least one."""
    height, width = image.size
    return max(1, round(height / stride)), max(1, round(width / stride))


def mirror(map_HWC: Map) -> Map:
    """The map mirrored left to right, with the same values."""
    return map_HWC[:, ::-1].copy("K")  # keeps the order of the axes in memory


@cache
def keep_freed_memory() -> None:
    """Sets glibc's malloc to keep up to `KEPT_BYTES` of freed memory; does nothing with another libc.

    Otherwise malloc may map each intermediate image of some hundred kilobytes again, and page faults cost as much time
    as the computation. The default priors took 6.8 ms an image without kept memory, and 5.1 ms with it.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # the maximum of glibc
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
