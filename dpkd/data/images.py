"""Image bytes to arrays, refusing what is cut short or too large instead of guessing.

Axes: H height, W width, C channels (RGB).
"""

import io
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 1 << 28
"""Larger images are refused: 2**28 pixels decode to 800 MB."""

# The most pixels that a byte can stand for, so that only a file that could pass the limit pays for a look at its
# header: progressive JPEG one bit for a block of 64, PNG one bit a pixel under deflate at 1032:1, and WebP is never
# larger than 16383 x 16383.
_PIXELS_PER_BYTE = {"jpg": 512, "png": 8256, "webp": 0}


class BrokenImage(ValueError):
    """Image bytes that cannot be used; the message says why, the caller adds whose they are."""


def image_format(data: bytes) -> str | None:
    """`jpg`, `png` or `webp` by the first bytes, whatever the file was called; None for any other."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return None


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
    extension = image_format(data)
    if extension is not None and len(data) * _PIXELS_PER_BYTE[extension] <= MAX_PIXELS:
        return
    try:
        width, height = Image.open(io.BytesIO(data)).size
    except Image.DecompressionBombError as error:
        raise BrokenImage(f"the image is too large to decode: {error}") from error
    except UnidentifiedImageError as error:  # whose own words name a place in memory, another one each time
        raise BrokenImage("the file is not an image of a known format") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise BrokenImage(f"the file is not an image that can be read: {error}") from error
    if width * height > MAX_PIXELS:
        raise BrokenImage(f"the image is {width}x{height}, more than {MAX_PIXELS} pixels: cut it into tiles")
