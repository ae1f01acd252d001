"""Codecs convert maps to bytes and back.

A stored map has the name of its codec, its shape (H, W, C) and its scale, so it is read without the prior's settings:

    codec    bytes                                                         value
    jpeg     grey JPEG, H x (C·W), the channels side by side               uint8 · scale, float32
    nibbles  zstd of 4-bit values in C, H, W order, first one high         4 bits · scale, float32
    bytes    zstd of 8-bit values in C, H, W order                          uint8 · scale, float32
    absent   empty: the sample has no such map                             NaN in each cell
    labels   PNG, H x (C·W), 8 bits if the labels fit, else 16             the label, int32 (scale 1)
"""

import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal, Protocol

import cv2
import numpy as np
import numpy.typing as npt
import zstandard

from dpkd.data.image_headers import read_header

Map = npt.NDArray[np.float32 | np.int32]
"""HWC: float32 in [0, 1], or int32 region labels."""
Shape = tuple[int, int, int]

MAX_VALUES = 1 << 26
"""Maximum number of values of a map: 256 MB as float32, and more than the largest image needs with a cell every two
pixels."""

PNG_PARAMETERS = (cv2.IMWRITE_PNG_COMPRESSION, 6, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_HUFFMAN_ONLY)
"""Smallest and fastest for label maps: a tenth smaller than the default in a third of the time."""


class Codec(Protocol):
    """Converts maps to bytes and back."""

    @property
    def name(self) -> str:
        """Name of the codec, stored with the bytes."""

    @property
    def scale(self) -> float:
        """The factor from a stored integer to its value."""

    def encode(self, map_HWC: Map) -> bytes:
        """The map as bytes."""

    def decode(self, data: bytes, shape: Shape) -> Map:
        """The map in `data`; raises ValueError for another shape, or the library's error."""


@dataclass(frozen=True)
class JpegCodec:
    """Grey JPEG of maps in [0, 1]: for smooth maps, with an error of about 0.01."""

    quality: int = 85
    name: ClassVar[str] = "jpeg"
    scale: ClassVar[float] = 1 / 255

    def encode(self, map_HWC: Map) -> bytes:
        parameters = (cv2.IMWRITE_JPEG_QUALITY, self.quality, cv2.IMWRITE_JPEG_OPTIMIZE, 1)
        return _encode_image(".jpg", _quantise(map_HWC, 255), parameters)

    def decode(self, data: bytes, shape: Shape) -> npt.NDArray[np.float32]:
        return _decode_image(data, shape) * np.float32(self.scale)


@dataclass(frozen=True)
class PackedCodec:
    """Values of 4 or 8 bits, with zstd: for many small channels or few cells, with an error of at most half a step."""

    name: str
    bits: Literal[4, 8]

    @property
    def scale(self) -> float:
        return 1 / (2**self.bits - 1)

    def encode(self, map_HWC: Map) -> bytes:
        value_N: npt.NDArray[Any] = _quantise(map_HWC, 2**self.bits - 1).transpose(2, 0, 1).ravel()
        if self.bits == 4:
            pair_N2 = np.append(value_N, np.zeros(value_N.size % 2, np.uint8)).reshape(-1, 2)
            value_N = pair_N2[:, 0] << 4 | pair_N2[:, 1]
        # level 3: a few kilobytes become as small as at the highest level, in a tenth of the time
        return zstandard.ZstdCompressor(level=3).compress(value_N.tobytes())

    def decode(self, data: bytes, shape: Shape) -> npt.NDArray[np.float32]:
        height, width, channels = shape
        num_values = height * width * channels
        num_bytes = (num_values * self.bits + 7) // 8
        try:
            declared = zstandard.frame_content_size(data)  # determines the allocated size
            if declared != num_bytes:
                raise ValueError(f"{declared} bytes instead of {num_bytes}")
            packed_N = np.frombuffer(_decompressor(threading.get_ident()).decompress(data), np.uint8)
        except zstandard.ZstdError as error:
            raise ValueError(f"not zstd data: {error}") from error
        value_N = _VALUES_OF_BYTE[self.bits].take(packed_N, axis=0).ravel()[:num_values]
        return value_N.reshape(channels, height, width).transpose(1, 2, 0)


@lru_cache(8)
def _decompressor(thread: int) -> zstandard.ZstdDecompressor:  # noqa: ARG001 (no two threads may share one)
    return zstandard.ZstdDecompressor()


_VALUES_OF_BYTE = {
    4: np.stack(np.divmod(np.arange(256), 16), axis=1).astype(np.float32) * np.float32(1 / 15),
    8: np.arange(256, dtype=np.float32) * np.float32(1 / 255),
}


@dataclass(frozen=True)
class LabelCodec:
    """PNG of region labels from 0 to 65,535: exact."""

    name: ClassVar[str] = "labels"
    scale: ClassVar[float] = 1.0

    def encode(self, map_HWC: Map) -> bytes:
        assert 0 <= map_HWC.min() <= map_HWC.max() < 65536, "labels start at 0 and fit into 16 bits"
        return _encode_image(".png", map_HWC.astype(np.uint8 if map_HWC.max() < 256 else np.uint16), PNG_PARAMETERS)

    def decode(self, data: bytes, shape: Shape) -> npt.NDArray[np.int32]:
        return _decode_image(data, shape).astype(np.int32)


NIBBLES, BYTES, LABELS = PackedCodec("nibbles", 4), PackedCodec("bytes", 8), LabelCodec()
CODECS: dict[str, Codec] = {codec.name: codec for codec in (JpegCodec(), NIBBLES, BYTES, LABELS)}
"""The codecs by the name in stored maps."""
ABSENT = "absent"
"""Replaces the name of the codec if the sample has no such map."""


def _quantise(map_HWC: Map, levels: int) -> npt.NDArray[np.uint8]:
    """The values times `levels`, rounded, as uint8."""
    return np.rint(np.clip(map_HWC, 0, 1) * levels).astype(np.uint8)


def _encode_image(extension: str, map_HWC: npt.NDArray[np.integer], parameters: tuple[int, ...]) -> bytes:
    """The channels side by side as an image file."""
    height, width, channels = map_HWC.shape
    done, data = cv2.imencode(extension, map_HWC.transpose(0, 2, 1).reshape(height, channels * width), parameters)
    assert done, f"OpenCV could not write {extension}"
    return data.tobytes()


def _decode_image(data: bytes, shape: Shape) -> npt.NDArray[np.integer]:
    """The channels of an image file with the channels side by side."""
    height, width, channels = shape
    header = read_header(data)
    as_declared = (header.width, header.height) == (channels * width, height)  # determines the allocated size
    image: npt.NDArray[Any] | None = (
        cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) if as_declared else None
    )
    if image is None or image.shape != (height, channels * width):
        raise ValueError(f"the bytes are not an image of {height} x {channels * width}")
    return image.reshape(height, channels, width).transpose(0, 2, 1)
