import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from dpkd.data.images import (
    MAX_PIXELS,
    BrokenImage,
    check_image,
    check_mask,
    decode_image,
    decode_mask,
    encode_png,
    image_format,
)
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


def test_grey_alpha_and_16_bit_become_8_bit_rgb():
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    grey = decode_image(encoded(Image.fromarray(pixels), "PNG"))
    np.testing.assert_array_equal(grey, np.repeat(pixels[..., None], 3, axis=2))
    colour = np.dstack([pixels, pixels + 1, pixels + 2, np.full_like(pixels, 128)])
    np.testing.assert_array_equal(decode_image(encoded(Image.fromarray(colour), "PNG")), colour[..., :3])
    deep = encode_png(pixels.astype(np.uint16) * np.uint16(256))
    np.testing.assert_array_equal(decode_image(deep)[..., 1], pixels)


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


def test_the_format_is_told_by_content_and_others_become_png():
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
    with pytest.raises(BrokenImage, match="mask is 20x16 and the image 16x20"):
        check_mask(mask_bytes(), height=20, width=16)
    with pytest.raises(BrokenImage, match="3 channels"):
        check_mask(image_bytes(0, image_format="PNG"), height=16, width=20)


def test_16_bit_masks_keep_their_numbers():
    instances = np.arange(320, dtype=np.uint16).reshape(16, 20) * 200
    np.testing.assert_array_equal(decode_mask(encode_png(instances)), instances)
