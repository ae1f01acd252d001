"""Image files of any bytes decode or are refused, and no small file takes much memory or time."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from PIL import Image

from dpkd.data.image_headers import BrokenImage, read_header
from dpkd.data.images import MAX_PIXELS, check_image, decode_mask
from tests.fuzz.damage import any_bytes, in_child, outcome

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 17, 3), dtype=np.uint8)


def encoded(image: Image.Image, image_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def image_size(data: bytes) -> tuple[int, int]:
    header = read_header(data)
    return header.width, header.height


def files() -> list[bytes]:
    colour = Image.fromarray(PIXELS)
    animation = {"save_all": True, "append_images": [colour.rotate(180)]}
    return [
        encoded(colour, "JPEG"),
        encoded(colour, "JPEG", progressive=True),
        encoded(colour.convert("CMYK"), "JPEG"),
        encoded(colour, "PNG"),
        encoded(colour.convert("P"), "PNG"),
        encoded(Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 256), "PNG"),
        encoded(colour, "PNG", **animation),
        encoded(colour, "WEBP"),
        encoded(colour, "WEBP", lossless=True),
        encoded(colour, "WEBP", **animation),
        encoded(colour, "GIF"),
        encoded(colour, "BMP"),
        encoded(colour, "PPM"),
        encoded(colour.convert("L"), "PPM"),
        *(
            encoded(colour, "TIFF", compression=name)
            for name in ("raw", "tiff_lzw", "tiff_deflate", "jpeg", "packbits")
        ),
        encoded(colour, "TIFF", **animation),
    ]


@given(any_bytes(files()))
def test_any_bytes_are_an_image_or_refused(data):
    if outcome(lambda: check_image(data)) is None:
        checked = check_image(data)
        height, width, channels = checked.image_HWC.shape
        assert (channels, checked.image_HWC.dtype) == (3, np.uint8)
        assert {height, width} == set(image_size(data))
        np.testing.assert_array_equal(check_image(checked.data).image_HWC, checked.image_HWC)


@given(any_bytes(files()))
def test_any_bytes_are_a_mask_or_refused(data):
    if outcome(lambda: decode_mask(data)) is None:
        mask_HW = decode_mask(data)
        assert mask_HW.dtype in (np.uint8, np.uint16)
        assert mask_HW.shape == image_size(data)[::-1]


@given(any_bytes(files()))
def test_the_size_in_the_header_is_what_pillow_says(data):
    if outcome(lambda: image_size(data)) is None and outcome(lambda: check_image(data)) is None:
        assert image_size(data) == Image.open(io.BytesIO(data)).size


def with_size(data: bytes, size: tuple[int, int]) -> bytes:
    """The file with another size in its header."""
    width, height = size
    if data[:2] == b"\xff\xd8":
        at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2")) + 5
        return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]
    if data[:4] == b"\x89PNG":
        head = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
        return data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:]
    if data[:2] == b"BM":
        return data[:18] + struct.pack("<ii", width, height) + data[26:]
    if data[:2] == b"P6":
        return data.replace(b"17 12", f"{width} {height}".encode(), 1)
    if data[:4] == b"RIFF":
        return data[:24] + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little") + data[30:]
    at_width, at_height = (data.index(struct.pack("<HH", tag, 4)) + 8 for tag in (256, 257))
    changed = bytearray(data)
    changed[at_width : at_width + 4], changed[at_height : at_height + 4] = (struct.pack("<I", each) for each in size)
    return bytes(changed)


def big_claims() -> dict[str, bytes]:
    colour = Image.fromarray(PIXELS)
    tiff = encoded(colour, "TIFF", tiffinfo={256: 17, 257: 12})
    tiff = tiff.replace(struct.pack("<HHI", 256, 3, 1), struct.pack("<HHI", 256, 4, 1), 1)
    tiff = tiff.replace(struct.pack("<HHI", 257, 3, 1), struct.pack("<HHI", 257, 4, 1), 1)
    animated = encoded(colour, "WEBP", save_all=True, append_images=[colour.rotate(180)])
    honest = {"jpg": encoded(colour, "JPEG"), "progressive.jpg": encoded(colour, "JPEG", progressive=True)}
    honest |= {"png": encoded(colour, "PNG"), "bmp": encoded(colour, "BMP"), "ppm": encoded(colour, "PPM")}
    honest |= {"tiff": tiff, "webp": animated}
    return {name: with_size(data, (60_000, 50_000)) for name, data in honest.items()}


@pytest.mark.parametrize("name", ["jpg", "progressive.jpg", "png", "bmp", "ppm", "tiff", "webp"])
def test_a_few_bytes_that_claim_a_huge_image_are_refused_by_their_header(name):
    data = big_claims()[name]
    assert image_size_or_refusal(data) in ((60_000, 50_000), None)
    with pytest.raises(BrokenImage, match=r"more than \d+ pixels|too large"):
        check_image(data)


def image_size_or_refusal(data: bytes) -> tuple[int, int] | None:
    try:
        return image_size(data)
    except BrokenImage:
        return None


def test_no_claim_of_a_size_takes_a_gigabyte(tmp_path):
    for name, data in big_claims().items():
        (tmp_path / name).write_bytes(data)
    code = """
import sys
from pathlib import Path
from dpkd.data.image_headers import BrokenImage
from dpkd.data.images import check_image, decode_mask
for path in sorted(Path(sys.argv[1]).iterdir()):
    for read in (check_image, decode_mask):
        try:
            read(path.read_bytes())
        except BrokenImage as error:
            print(path.name, error)
"""
    told = in_child(code, str(tmp_path), memory_bytes=1 << 30).splitlines()
    assert len(told) == 2 * len(big_claims()), told


def test_a_progressive_jpeg_of_endless_scans_is_refused():
    data = with_size(encoded(Image.fromarray(PIXELS), "JPEG", progressive=True), (13_000, 13_000))
    assert MAX_PIXELS > 13_000**2
    scan = data[data.rindex(b"\xff\xda") : -2]
    with pytest.raises(BrokenImage, match=r"13000x13000 in \d+ scans"):
        check_image(data[:-2] + 500 * scan + data[-2:])


def test_an_image_without_pixels_is_refused():
    for name, data in big_claims().items():
        for size in ((0, 5), (5, 0), (0, 0)):
            if name != "webp":  # it stores the size less one
                with pytest.raises(BrokenImage):
                    check_image(with_size(data, size))


def test_formats_that_are_not_promised_are_refused_for_images_and_masks():
    for data in (
        encoded(Image.fromarray(PIXELS), "GIF"),
        b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 1 +X 1\n" + bytes(4),
    ):
        for read in (check_image, decode_mask):
            with pytest.raises(BrokenImage, match="not a readable JPEG, PNG, WebP"):
                read(data)


def test_of_an_animation_the_first_picture_counts():
    colour = Image.fromarray(PIXELS)
    for name, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})):
        data = encoded(colour, name, save_all=True, append_images=[colour.rotate(180)], **options)
        np.testing.assert_array_equal(check_image(data).image_HWC, PIXELS)
