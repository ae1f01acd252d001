"""Decodes image bytes to arrays; truncated, too large or unsupported images are refused with the reason.

Axes: H height, W width, C channels (RGB).
"""

import io
import warnings
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from dpkd.data.image_headers import UNREADABLE, BrokenImage, Header, image_format, read_header
from dpkd.data.settings import Window

MAX_PIXELS = 178_956_970
"""Larger images are refused before decoding: this size decodes to 537 MB, and is the limit of Pillow."""
MAX_SCAN_PIXELS = 16 * MAX_PIXELS
"""A decoder visits all pixels in each scan of a progressive JPEG, and a scan may take 12 bytes; usual files have 10."""


def decode_image(data: bytes, *, window: Window | None = None) -> NDArray[np.uint8]:
    """The image as uint8 HWC RGB, upright by its EXIF orientation.

    Grey becomes three equal channels; alpha is dropped. The window maps values that are not 8-bit (16 or 32 bits,
    signed, float) to 0 to 255. Raises `BrokenImage` for such values without a window, for bytes that are not an image,
    for truncated images, and for more than `MAX_PIXELS` pixels.
    """
    header = _checked_header(data)
    if header.deep:
        return _to_8_bit(data, header, window)
    if header.format != "pnm" and not header.alpha:
        return _decode(data, header, cv2.IMREAD_COLOR_RGB)
    from PIL import Image  # noqa: PLC0415  most images need no Pillow, and settings load this module

    # OpenCV multiplies a TIFF by alpha, and does not scale a PNM by its maximum
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return np.array(Image.open(io.BytesIO(data), formats=("PPM", "TIFF")).convert("RGB"))
    except UNREADABLE as error:
        raise BrokenImage(f"the {header.format} cannot be decoded: {error}") from error


def decode_checked(data: bytes) -> NDArray[np.uint8]:
    """`decode_image` of bytes that `check_image` has returned, without another look at size, type and end."""
    return _decode(data, Header(image_format(data) or "jpg", 0, 0), cv2.IMREAD_COLOR_RGB)


def decode_mask(data: bytes) -> NDArray[np.uint8 | np.uint16]:
    """The mask as stored, HW, uint8 or uint16; raises `BrokenImage` as `decode_image` does, and for a colour image."""
    header = _checked_header(data)
    mask = _decode(data, header, cv2.IMREAD_UNCHANGED)
    if mask.ndim != 2:
        raise BrokenImage(f"the mask has {mask.shape[2]} channels: save it with one channel")
    if header.number != "unsigned" or mask.dtype not in (np.uint8, np.uint16):
        raise BrokenImage(f"the mask has {header.number} {header.bits}-bit values: save it as uint8 or uint16")
    if header.format == "tiff" and (header.photometric != 1 or header.alpha) and header.bits > 1:
        raise BrokenImage("the mask is a tiff that is not one band with black at 0: save it as PNG")
    return mask


def encode_png(image: NDArray[np.uint8 | np.uint16]) -> bytes:
    """Deterministic PNG bytes of an HW or HWC RGB array."""
    ordered = image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    written, data = cv2.imencode(".png", ordered)
    assert written, "OpenCV could not write a PNG"
    return data.tobytes()


class CheckedImage(NamedTuple):
    """Image bytes that decode, in a format that shards store."""

    data: bytes
    extension: str
    image_HWC: NDArray[np.uint8]


def check_image(data: bytes, *, window: Window | None = None) -> CheckedImage:
    """Decodes the image; keeps 8-bit JPEG, PNG and WebP bytes unchanged and converts any other image to PNG."""
    image = decode_image(data, window=window)
    extension = image_format(data)
    if extension is None or read_header(data).deep:
        return CheckedImage(encode_png(image), "png", image)
    return CheckedImage(data, extension, image)


def check_mask(data: bytes, *, height: int, width: int) -> bytes:
    """PNG bytes of the mask; raises `BrokenImage` if its size differs from the image's."""
    mask = decode_mask(data)
    if mask.shape != (height, width):
        raise BrokenImage(f"the mask is {mask.shape[1]}x{mask.shape[0]}, and the image is {width}x{height}")
    return data if image_format(data) == "png" else encode_png(mask)


def _checked_header(data: bytes) -> Header:
    """The header; raises `BrokenImage` for an image that needs too much memory or time."""
    header = read_header(data)
    size, num_pixels = f"{header.width}x{header.height}", header.width * header.height
    if num_pixels > MAX_PIXELS:
        raise BrokenImage(f"the image is {size}, more than {MAX_PIXELS} pixels: cut it into tiles")
    if num_pixels * header.num_scans > MAX_SCAN_PIXELS:
        raise BrokenImage(f"the jpg is {size} in {header.num_scans} scans, which is too slow to decode: save it again")
    if header.format == "jpg" and header.deep:
        raise BrokenImage(f"the jpg has {header.bits}-bit values, which are not supported: save it with 8 bits")
    return header


def _decode(data: bytes, header: Header, flags: int) -> NDArray[Any]:
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise BrokenImage(f"the image cannot be decoded: {error.err}") from error
    if image is None:
        kind = f" of {header.number} {header.bits}-bit values" if header.deep else ""
        compression = f" (compression {header.compression})" if header.compression != 1 else ""
        raise BrokenImage(f"the {header.format}{kind}{compression} cannot be decoded: it is damaged or of a rare kind")
    return image


def _to_8_bit(data: bytes, header: Header, window: Window | None) -> NDArray[np.uint8]:
    """Maps values of more than 8 bits, signed or float, to uint8 by the window."""
    flags = cv2.IMREAD_UNCHANGED if header.format == "tiff" else cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH
    stored = _decode(data, header, flags)
    if header.number == "signed" and stored.dtype.kind == "u":  # OpenCV before 5 returns them so
        stored = stored.view(stored.dtype.name.removeprefix("u"))
    if stored.dtype.kind == "f" and np.isnan(stored).any():
        raise BrokenImage("the image has NaN values: replace them")
    if window is None:
        raise BrokenImage(
            f"the {header.format} has {header.number} {header.bits}-bit values ({stored.min():g} to {stored.max():g}), "
            "and networks need 8 bits: set data.window to {low: …, high: …}, the values for black and white, or save "
            "the images with 8 bits"
        )
    image = np.empty((*stored.shape[:2], 3), np.uint8)
    for y, row in enumerate(stored):  # row by row: in float64 a large image would take gigabytes
        colour_WC = row.reshape(len(row), -1)[:, 2::-1].astype(np.float64)
        share_WC = ((colour_WC - window.low) / (window.high - window.low)).clip(0, 1)
        image[y] = (255 * (1 - share_WC if header.photometric == 0 else share_WC)).round()
    return image
