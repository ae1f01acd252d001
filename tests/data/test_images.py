import io
import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from dpkd.data.image_headers import BrokenImage, image_format
from dpkd.data.images import MAX_PIXELS, check_image, check_mask, decode_image, decode_mask, encode_png
from dpkd.data.settings import Window
from tests.data.packing import image_bytes, mask_bytes


def encoded(image: Image.Image, image_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("image_format", ["PNG", "BMP", "TIFF"])
def test_lossless_formats_decode_to_the_pixels_that_pillow_reads(image_format):
    data = image_bytes(0, image_format=image_format)
    np.testing.assert_array_equal(decode_image(data), np.asarray(Image.open(io.BytesIO(data))))


def test_a_jpeg_decodes_as_pillow_does_within_rounding():
    data = encoded(Image.fromarray(np.full((16, 20, 3), (200, 30, 90), np.uint8)), "JPEG", quality=95)
    difference = decode_image(data).astype(int) - np.asarray(Image.open(io.BytesIO(data))).astype(int)
    assert abs(difference).max() <= 2


def test_grey_becomes_rgb_and_alpha_is_dropped():
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    grey = decode_image(encoded(Image.fromarray(pixels), "PNG"))
    np.testing.assert_array_equal(grey, np.repeat(pixels[..., None], 3, axis=2))
    colour = np.dstack([pixels, pixels + 1, pixels + 2, np.full_like(pixels, 128)])
    np.testing.assert_array_equal(decode_image(encoded(Image.fromarray(colour), "PNG")), colour[..., :3])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_stands_upright_by_its_exif(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.open(io.BytesIO(image_bytes(1, image_format="PNG"))).resize((64, 48))
    data = encoded(image, "JPEG", exif=exif.tobytes(), quality=95, subsampling=0)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    decoded = decode_image(data)
    assert decoded.shape == upright.shape
    assert abs(decoded.astype(int) - upright.astype(int)).mean() < 2


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_an_image_that_is_cut_anywhere_is_refused(image_format):
    data = image_bytes(2, image_format=image_format)
    for size in [0, 1, 8, 20, *range(40, len(data) - 2, 97), len(data) - 2]:
        with pytest.raises(BrokenImage):
            decode_image(data[:size])


def test_bytes_that_are_no_image_are_refused():
    for data in (b"", b"<html>not found</html>", bytes(1000), b"\xff\xd8\xff" + bytes(100) + b"\xff\xda\xff\xd9"):
        with pytest.raises(BrokenImage):
            decode_image(data)


def test_a_small_file_that_would_decode_to_a_huge_image_is_refused():
    data = encoded(Image.new("1", (MAX_PIXELS // 10_000 + 1, 10_000)), "PNG")
    assert len(data) < 200_000
    with pytest.raises(BrokenImage, match=r"pixels|too large"):
        decode_image(data)


def test_the_format_is_known_by_content_and_others_become_png():
    assert [image_format(image_bytes(0, image_format=name)) for name in ("JPEG", "PNG", "WEBP", "BMP")] == [
        "jpg",
        "png",
        "webp",
        None,
    ]
    data = image_bytes(3, image_format="BMP")
    checked = check_image(data)
    assert (checked.extension, image_format(checked.data)) == ("png", "png")
    np.testing.assert_array_equal(decode_image(checked.data), decode_image(data))
    assert check_image(image_bytes(3)).data == image_bytes(3)


def test_a_mask_of_another_size_or_in_colour_is_refused():
    assert check_mask(mask_bytes(), height=16, width=20) == mask_bytes()
    with pytest.raises(BrokenImage, match="mask is 20x16, and the image is 16x20"):
        check_mask(mask_bytes(), height=20, width=16)
    with pytest.raises(BrokenImage, match="3 channels"):
        check_mask(image_bytes(0, image_format="PNG"), height=16, width=20)


def test_16_bit_masks_keep_their_numbers():
    instances = np.arange(320, dtype=np.uint16).reshape(16, 20) * 200
    np.testing.assert_array_equal(decode_mask(encode_png(instances)), instances)


RAMP = np.arange(48).reshape(6, 8)
COLOUR = np.dstack([RAMP * 5, RAMP * 4, RAMP * 3]).astype(np.uint8)
ALPHA = np.full((6, 8, 1), 10, np.uint8)


def tiff(pixels: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **options)
    return buffer.getvalue()


DEEP = {
    "signed 16-bit": (tiff((RAMP * 40 - 1000).astype(np.int16)), -1000, 880),
    "signed 16-bit of another byte order": (tiff((RAMP * 40 - 1000).astype(">i2"), byteorder=">"), -1000, 880),
    "signed 16-bit in BigTIFF": (tiff((RAMP * 40 - 1000).astype(np.int16), bigtiff=True), -1000, 880),
    "signed 8-bit": (tiff((RAMP - 24).astype(np.int8)), -24, 23),
    "unsigned 16-bit of 12": (tiff((RAMP * 80).astype(np.uint16)), 0, 3760),
    "unsigned 16-bit RGB": (tiff((COLOUR.astype(np.uint16) * 257), photometric="rgb"), 0, 60395),
    "unsigned 32-bit": (tiff((RAMP * 80_000).astype(np.uint32)), 0, 3_760_000),
    "signed 32-bit": (tiff((RAMP * 80_000 - 9).astype(np.int32)), -9, 3_759_991),
    "float 32-bit": (tiff((RAMP / 47).astype(np.float32)), 0, 1),
    "float 64-bit": (tiff(RAMP / 47), 0, 1),
    "unsigned 16-bit PNG": (encode_png((RAMP * 80).astype(np.uint16)), 0, 3760),
    "unsigned 16-bit RGB PNG": (encode_png(COLOUR.astype(np.uint16) * np.uint16(257)), 0, 60395),
    "unsigned 16-bit PNM": (b"P5 # a comment\n8 6 4095\n" + (RAMP * 80).astype(">u2").tobytes(), 0, 3760),
}


@pytest.mark.parametrize("name", DEEP)
def test_numbers_that_are_not_8_bit_become_grey_values_by_the_window_and_are_refused_without_one(name):
    data, low, high = DEEP[name]
    with pytest.raises(BrokenImage, match=rf"has {' '.join(name.split()[:2])} values .* set data\.window"):
        check_image(data)
    checked = check_image(data, window=Window(low=low, high=high))
    expected = (RAMP * 255 / 47).round()
    np.testing.assert_array_equal(checked.image_HWC[..., 0], expected)
    assert (checked.extension, image_format(checked.data)) == ("png", "png")
    np.testing.assert_array_equal(decode_image(checked.data), checked.image_HWC)


def test_values_outside_the_window_are_black_and_white_and_8_bit_images_do_not_change():
    data = tiff(np.array([[-3000, -1000, 0, 1000, 9000]], np.int16))
    window = Window(low=-1000, high=1000)
    assert decode_image(data, window=window)[0, :, 0].tolist() == [0, 0, 128, 255, 255]
    np.testing.assert_array_equal(decode_image(tiff(COLOUR, photometric="rgb"), window=window), COLOUR)
    white_is_zero = tiff(np.array([[0, 1000]], np.uint16), photometric="miniswhite")
    assert decode_image(white_is_zero, window=Window(low=0, high=1000))[0, :, 0].tolist() == [255, 0]
    with pytest.raises(ValueError, match="must be less than"):
        Window(low=3, high=3)


STRANGE = {
    "float 16-bit": (tiff(RAMP.astype(np.float16)), "float 16-bit"),
    "NaN": (tiff(np.full((4, 4), np.nan, np.float32)), "NaN values"),
    "complex": (tiff(RAMP.astype(np.complex64)), "sample format 6"),
    "five bands": (tiff(np.dstack([COLOUR, ALPHA, ALPHA]), photometric="rgb", planarconfig="contig"), "5 bands"),
    "infrared": (tiff(np.dstack([COLOUR, ALPHA]), photometric="rgb", extrasamples=["unspecified"]), "4 bands"),
    "three grey bands": (tiff(COLOUR, photometric="minisblack", planarconfig="contig"), "3 bands"),
    "16-bit CMYK": (tiff(np.dstack([COLOUR, ALPHA]).astype(np.uint16), photometric="separated"), "photometric 5"),
    "LZMA": (tiff(COLOUR, photometric="rgb", compression="lzma"), "compression 34925"),
    "float PNM": (b"Pf\n8 6\n-1.0\n" + RAMP.astype("<f4").tobytes(), "unsupported kind of PNM image"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_what_no_decoder_reads_right_is_refused_by_its_reason(name):
    data, reason = STRANGE[name]
    with pytest.raises(BrokenImage, match=reason):
        decode_image(data, window=Window(low=0, high=1))


def test_alpha_is_dropped_alike_in_every_format():
    rgba = np.dstack([COLOUR, ALPHA])
    grey = np.dstack([COLOUR[..., 0], ALPHA])
    files = [encoded(Image.fromarray(rgba), "PNG"), encoded(Image.fromarray(rgba), "WEBP", lossless=True, exact=True)]
    files += [encoded(Image.fromarray(rgba), "TIFF", compression=name) for name in ("raw", "tiff_lzw", "tiff_deflate")]
    files += [tiff(rgba, photometric="rgb", extrasamples=["unassalpha"])]
    files += [
        tiff(rgba.transpose(2, 0, 1).copy(), photometric="rgb", planarconfig="separate", extrasamples=["unassalpha"])
    ]
    for data in files:
        np.testing.assert_array_equal(decode_image(data), COLOUR)
    for data in (
        encoded(Image.fromarray(grey, "LA"), "PNG"),
        tiff(grey, photometric="minisblack", planarconfig="contig", extrasamples=["unassalpha"]),
    ):
        np.testing.assert_array_equal(decode_image(data)[..., 1], COLOUR[..., 0])
    multiplied = np.dstack([COLOUR // 5, np.full((6, 8, 1), 51, np.uint8)])
    data = tiff(multiplied, photometric="rgb", extrasamples=["assocalpha"])
    assert abs(decode_image(data).astype(int) - COLOUR // 5 * 5).max() <= 1


def test_palettes_bits_cmyk_and_declared_maxima_keep_their_values():
    one_bit = Image.fromarray(RAMP % 2 == 1)
    for name in ("PNG", "TIFF", "BMP", "PPM"):
        np.testing.assert_array_equal(decode_image(encoded(one_bit, name))[..., 0], RAMP % 2 * 255)
    palette = Image.fromarray(COLOUR).convert("P")
    for name in ("PNG", "TIFF", "BMP"):
        np.testing.assert_array_equal(decode_image(encoded(palette, name)), np.asarray(palette.convert("RGB")))
    cmyk = Image.fromarray(COLOUR).convert("CMYK")
    for name, options in (("TIFF", {}), ("JPEG", {"quality": 100, "subsampling": 0})):
        assert abs(decode_image(encoded(cmyk, name, **options)).astype(int) - COLOUR).max() <= 6
    by_94 = b"P5 8 6 94\n" + (RAMP * 2).astype(np.uint8).tobytes()
    np.testing.assert_array_equal(decode_image(by_94)[..., 0], (RAMP * 255 / 47).round())


def test_masks_keep_numbers_or_are_refused():
    numbers = RAMP.astype(np.uint16)
    np.testing.assert_array_equal(decode_mask(tiff(numbers)), numbers)
    for data in (
        tiff(RAMP.astype(np.int16)),
        tiff(RAMP.astype(np.float32)),
        tiff(RAMP.astype(np.uint8), photometric="miniswhite"),
        tiff(COLOUR, photometric="minisblack", planarconfig="contig"),
    ):
        with pytest.raises(BrokenImage):
            decode_mask(data)


VIDEO = b"\0\0\0\x18ftypmp42" + bytes(500) + b"\x17\xff\xda\x03\x55\xff\xd9" + bytes(100) + b"\xff\xda" + bytes(500)


def with_thumbnail(jpeg: bytes) -> bytes:
    """The JPEG with a whole one inside an APP1 segment."""
    inner = b"Exif\0\0" + image_bytes(5, size=(8, 8))
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(inner) + 2) + inner + jpeg[2:]


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP"])
def test_what_follows_the_end_of_an_image_is_passed_over(name):
    data = image_bytes(2, image_format=name)
    np.testing.assert_array_equal(decode_image(data + VIDEO), decode_image(data))
    np.testing.assert_array_equal(decode_image(data + data[:30]), decode_image(data))
    assert check_image(data + VIDEO).data == data + VIDEO


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
def test_a_jpeg_that_is_cut_is_refused_whatever_its_segments_hold(options):
    pixels = Image.open(io.BytesIO(image_bytes(2, size=(64, 48)))).convert("RGB")
    data = with_thumbnail(encoded(pixels, "JPEG", **options))
    np.testing.assert_array_equal(decode_image(data), decode_image(encoded(pixels, "JPEG", **options)))
    for size in range(40, len(data) - 1, 61):
        with pytest.raises(BrokenImage):
            decode_image(data[:size])


def test_a_png_that_is_cut_is_refused_though_its_text_holds_an_end_mark():
    whole = image_bytes(2, image_format="PNG")
    text = b"tEXt" + b"Comment\0IEND\xaeB`\x82"
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    data = whole[:33] + chunk + whole[33:]
    np.testing.assert_array_equal(decode_image(data), decode_image(whole))
    with pytest.raises(BrokenImage, match="cut short"):
        decode_image(data[:-300])
