"""Image bytes to arrays, refusing what is cut short or too large instead of guessing.

Axes: H height, W width, C channels (RGB).
"""

import io
import struct
import warnings
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from dpkd.errors import without_secrets

MAX_PIXELS = 178_956_970
"""Larger images are refused, before they are decoded: these decode to 537 MB, and Pillow opens none beyond."""
MAX_SCAN_PIXELS = 16 * MAX_PIXELS
"""A progressive JPEG goes over its pixels once a scan, and a scan may take a dozen bytes; files have about ten."""

_FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "PPM")
"""What is read besides WebP, by Pillow's names; OpenCV would try a dozen more."""

UNREADABLE = (OSError, ValueError, TypeError, SyntaxError, EOFError, LookupError, ArithmeticError, struct.error)
"""What Pillow raises over bytes that are not an image."""


class BrokenImage(ValueError):
    """Image bytes that cannot be used; the message says why, the caller adds whose they are."""

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))


def image_format(data: bytes) -> str | None:
    """`jpg`, `png` or `webp` by the first bytes, whatever the file was called; None for any other."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return None


def image_size(data: bytes) -> tuple[int, int]:
    """Width and height as the header gives them, before any rotation; raises `BrokenImage` where none can be read."""
    match image_format(data):
        case "webp":
            return _webp_size(data)
        case "png" if data[12:16] == b"IHDR" and len(data) >= 24:
            return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
        case "jpg" if (size := _jpeg_size(data)) is not None:
            return size
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images, and of what is odd in a header
            return Image.open(io.BytesIO(data), formats=_FORMATS).size
    except Image.DecompressionBombError as error:
        raise BrokenImage(f"the image is too large: {error}: cut it into tiles") from error
    except UNREADABLE as error:
        raise BrokenImage("the file is no JPEG, PNG, WebP, BMP, TIFF or PNM image that can be read") from error


def decode_image(data: bytes) -> npt.NDArray[np.uint8]:
    """The image as uint8 HWC RGB, upright by its EXIF orientation.

    Grey becomes three equal channels, 16 bits keep their upper 8, alpha is dropped. Raises `BrokenImage` for bytes that
    are no image, are cut short, or hold more than `MAX_PIXELS` pixels.
    """
    image = _decode(data, cv2.IMREAD_COLOR)
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), dtype=np.uint8)


def decode_mask(data: bytes) -> npt.NDArray[np.uint8 | np.uint16]:
    """A mask as it is stored, HW, uint8 or uint16; raises `BrokenImage` as `decode_image` does, and for colour."""
    mask = _decode(data, cv2.IMREAD_UNCHANGED)
    if mask.ndim != 2:
        raise BrokenImage(f"the mask has {mask.shape[2]} channels, and one is needed")
    if mask.dtype not in (np.uint8, np.uint16):
        raise BrokenImage(f"the mask is of type {mask.dtype}, and uint8 or uint16 is needed")
    return mask


def encode_png(image: npt.NDArray[np.uint8 | np.uint16]) -> bytes:
    """PNG bytes of an HW or an HWC RGB array, the same for the same array."""
    ordered = image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    written, data = cv2.imencode(".png", ordered)
    assert written, "OpenCV could not write a PNG"
    return data.tobytes()


@dataclass(frozen=True)
class CheckedImage:
    """Image bytes that decode, in a format that shards hold."""

    data: bytes
    extension: str
    image_HWC: npt.NDArray[np.uint8]


def check_image(data: bytes) -> CheckedImage:
    """Decodes once, and keeps the bytes as they are, or makes a PNG of a format other than JPEG, PNG and WebP."""
    image = decode_image(data)
    extension = image_format(data)
    if extension is None:
        return CheckedImage(data=encode_png(image), extension="png", image_HWC=image)
    return CheckedImage(data=data, extension=extension, image_HWC=image)


def check_mask(data: bytes, *, height: int, width: int) -> bytes:
    """PNG bytes of a mask that fits its image; raises `BrokenImage` where it does not."""
    mask = decode_mask(data)
    if mask.shape != (height, width):
        raise BrokenImage(f"the mask is {mask.shape[1]}x{mask.shape[0]} and the image {width}x{height}")
    return data if image_format(data) == "png" else encode_png(mask)


def _decode(data: bytes, flags: int) -> npt.NDArray[Any]:
    _refuse_cut(data)
    _refuse_huge(data)
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise BrokenImage(f"the image cannot be decoded: {error.err}") from error
    if image is None:
        raise BrokenImage(f"the {image_format(data) or 'file'} cannot be decoded as an image")
    return image


def _refuse_cut(data: bytes) -> None:
    """Looks for the end: some releases of OpenCV fill the missing part of a cut JPEG with grey and say nothing."""
    if not data:
        raise BrokenImage("the file is empty")
    match image_format(data):
        case "jpg":
            whole = data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda") > 0
        case "png":
            whole = data.find(b"IEND\xaeB`\x82", -4096) > 0 or b"IEND\xaeB`\x82" in data
        case "webp":
            whole = len(data) >= 8 + int.from_bytes(data[4:8], "little")
        case _:
            whole = True
    if not whole:
        raise BrokenImage(f"the {image_format(data)} is cut short")


def _refuse_huge(data: bytes) -> None:
    """Looks at the header alone, which a small file may fill with any size."""
    width, height = image_size(data)
    if width * height > MAX_PIXELS:
        raise BrokenImage(f"the image is {width}x{height}, more than {MAX_PIXELS} pixels: cut it into tiles")
    num_scans = data.count(b"\xff\xda")
    if image_format(data) == "jpg" and width * height * num_scans > MAX_SCAN_PIXELS:
        raise BrokenImage(f"the jpg is {width}x{height} in {num_scans} scans, which takes too long: save it anew")


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """The size in the first frame header, None where anything before it is not a segment after the other.

    So it is what the decoder finds too, in a tenth of the time that Pillow takes.
    """
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(data[at + 7 : at + 9], "big"), int.from_bytes(data[at + 5 : at + 7], "big")
        if marker < 0xC0 or 0xD0 <= marker <= 0xDA or marker == 0xFF or length < 2:
            return None
        at += 2 + length
    return None


def _webp_size(data: bytes) -> tuple[int, int]:
    """The canvas of a WebP file (RFC 9649, section 2)."""
    kind, head = data[12:16], data[20:30]
    if len(head) < 10:
        raise BrokenImage("the webp is cut short")
    if kind == b"VP8X":
        return 1 + int.from_bytes(head[4:7], "little"), 1 + int.from_bytes(head[7:10], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(head[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        return int.from_bytes(head[6:8], "little") & 0x3FFF, int.from_bytes(head[8:10], "little") & 0x3FFF
    raise BrokenImage("the webp begins with no image")
