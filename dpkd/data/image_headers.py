"""Reads the header of an image file before decoding: size, number type, and whether the file is complete.

Decoders convert silently: they reinterpret signed numbers, keep the upper half of 16 bits, and fill missing data with
grey. So the header is read first, and an unsuitable file is refused with the reason.
"""

import io
import re
import struct
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dpkd.errors import without_secrets

UNREADABLE = (OSError, ValueError, TypeError, SyntaxError, EOFError, LookupError, ArithmeticError, struct.error)
"""The exceptions of Pillow for bytes that are not an image."""


class BrokenImage(ValueError):
    """Image bytes that cannot be used; the message has the reason, the caller adds the file name."""

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))


@dataclass(frozen=True)
class Header:
    """The content of an image file's header."""

    format: Literal["jpg", "png", "webp", "tiff", "bmp", "pnm"]
    width: int
    """Before any rotation."""
    height: int
    bits: int = 8
    """Bits of one value."""
    number: Literal["unsigned", "signed", "float"] = "unsigned"
    num_scans: int = 1
    """Passes of a JPEG decoder over the pixels."""
    compression: int = 1
    photometric: int = 1
    """TIFF codes of compression and colours; photometric 0 is white at zero, 1 black at zero."""
    alpha: bool = False
    """True for a TIFF with an alpha channel."""

    @property
    def deep(self) -> bool:
        """True if the values are not whole numbers from 0 to 255."""
        return self.bits > 8 or self.number != "unsigned"


def image_format(data: bytes) -> Literal["jpg", "png", "webp"] | None:
    """The format by the first bytes, not by the file name; None for a format that shards do not store."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def read_header(data: bytes) -> Header:
    """Reads the header; raises `BrokenImage` for a truncated file or an unsupported format."""
    if not data:
        raise BrokenImage("the file is empty")
    match image_format(data):
        case "jpg":
            return _jpeg(data)
        case "png":
            return _png(data)
        case "webp":
            return _webp(data)
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _tiff(data)
    return _bmp_or_pnm(data)


_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
"""A JPEG marker; not a stuffed 0xFF, a restart within a scan, or a fill byte."""
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_START, _JPEG_END, _JPEG_SCAN, _JPEG_EMPTY = 0xD8, 0xD9, 0xDA, 0x01


def _jpeg(data: bytes) -> Header:
    """Walks the segments up to the first end mark outside a segment (ISO 10918-1, B.1).

    Skips data after the end mark (the video of a motion photo) and data inside a segment (a thumbnail). Skips bytes
    between segments, as decoders do.
    """
    frame, num_scans, marker, at = -1, 0, _JPEG_START, 2
    while marker != _JPEG_END and (match := _MARKER.search(data, at)):
        marker, at = data[match.end() - 1], match.end()
        num_scans += marker == _JPEG_SCAN
        if marker in _JPEG_FRAMES and frame < 0:
            frame = at
        if marker not in (_JPEG_START, _JPEG_END, _JPEG_EMPTY):
            at += int.from_bytes(data[at : at + 2], "big")
    if marker != _JPEG_END or not num_scans or frame < 0:
        raise BrokenImage("the jpg is cut short")
    bits, height, width = struct.unpack_from(">BHH", data, frame + 2)
    return Header("jpg", width, height, bits=bits, num_scans=num_scans)


def _png(data: bytes) -> Header:
    at, kind = 8, b""
    while kind != b"IEND":
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        at += 12 + length
        if at > len(data):
            raise BrokenImage("the png is cut short")
    if data[12:16] != b"IHDR":
        raise BrokenImage("the png does not begin with its header")
    width, height, bits = struct.unpack_from(">IIB", data, 16)
    return Header("png", width, height, bits=bits)


def _webp(data: bytes) -> Header:
    """The canvas of a WebP file (RFC 9649, section 2)."""
    kind, head = data[12:16], data[20:30]
    if len(head) < 10 or len(data) < 8 + int.from_bytes(data[4:8], "little"):
        raise BrokenImage("the webp is cut short")
    if kind == b"VP8X":
        width, height = (1 + int.from_bytes(head[at : at + 3], "little") for at in (4, 7))
    elif kind == b"VP8L":
        bits = int.from_bytes(head[1:5], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    elif kind == b"VP8 ":
        width, height = (int.from_bytes(head[at : at + 2], "little") & 0x3FFF for at in (6, 8))
    else:
        raise BrokenImage("the webp does not begin with an image")
    return Header("webp", width, height)


_TIFF_COLOURS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3, 8: 3}
"""Photometric interpretation -> bands: white is zero, black is zero, RGB, palette, CMYK, YCbCr, CIE Lab."""
_TIFF_NUMBERS: dict[int, Literal["unsigned", "signed", "float"]] = {1: "unsigned", 2: "signed", 3: "float"}


def _tiff(data: bytes) -> Header:
    """The first picture of a TIFF (TIFF 6.0, sections 2 to 8 and 18 to 19)."""
    from PIL import TiffImagePlugin  # noqa: PLC0415  most images need no Pillow, and settings load this module

    big = 43 in data[2:4]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # the byte order as an argument: Pillow mistakes a big-endian BigTIFF for a TIFF
            tags = TiffImagePlugin.ImageFileDirectory_v2(b"II+\0" + data[4:16] if big else data[:8], data[:2])
            file = io.BytesIO(data)
            file.seek(tags.next)
            tags.load(file)

        def numbers(tag: int, default: int) -> list[int]:
            return [int(number) for number in np.ravel(tags.get(tag, default))]

        width, height = int(tags[256]), int(tags[257])
        bands, photometric, extra, compression = (
            numbers(tag, default)[0] for tag, default in ((277, 1), (262, 1), (338, 0), (259, 1))
        )
        all_bits, kinds = sorted(set(numbers(258, 1))), sorted(set(numbers(339, 1)))
    except UNREADABLE as error:
        raise BrokenImage(f"the tiff is damaged or cut short: {error}") from error
    bits, number, colours = all_bits[-1], _TIFF_NUMBERS.get(kinds[-1]), _TIFF_COLOURS.get(photometric)
    alpha = colours is not None and bands == colours + 1 and extra in (1, 2)
    is_plain = photometric in (0, 1, 2) and not (alpha and extra == 1)
    if (
        number is None
        or (bands != colours and not alpha)
        or len(kinds) > 1
        or len(all_bits) > 1
        or bits not in (1, 2, 4, 8, 16, 32, 64)
        or ((bits > 8 or number != "unsigned") and not is_plain)
    ):
        raise BrokenImage(
            f"the tiff has {bands} bands of {'/'.join(map(str, all_bits))} bits (sample format "
            f"{'/'.join(map(str, kinds))}, photometric {photometric}, extra samples {extra}), which is not supported: "
            "save the 1 or 3 bands for the network as grey or RGB with 8 or 16 bits"
        )
    return Header("tiff", width, height, bits, number, 1, compression, photometric, alpha)


_PNM_MAXIMUM = re.compile(rb"P[2356](?:(?:\s|#[^\n]*\n)+\d+){2}(?:\s|#[^\n]*\n)+(\d+)")


def _bmp_or_pnm(data: bytes) -> Header:
    from PIL import Image  # noqa: PLC0415

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about large images and unusual headers
            image = Image.open(io.BytesIO(data), formats=("BMP", "PPM"))
    except Image.DecompressionBombError as error:
        raise BrokenImage(f"the image is too large: {error}: cut it into tiles") from error
    except UNREADABLE as error:
        raise BrokenImage("the file is not a readable JPEG, PNG, WebP, BMP, TIFF or PNM image") from error
    if image.format == "BMP" or data[:2] in (b"P1", b"P4"):
        return Header("bmp" if image.format == "BMP" else "pnm", *image.size)
    maximum = _PNM_MAXIMUM.match(data)
    if maximum is None:
        raise BrokenImage("the file is an unsupported kind of PNM image: save it as PNG")
    return Header("pnm", *image.size, bits=8 if int(maximum[1]) < 256 else 16)
