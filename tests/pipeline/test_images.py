"""Decoding: whatever the format, Pillow's pixels; damage named; much too large decoded smaller."""

import io
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import functional as F

from pipeline.data.images import decode_image


def photograph(height: int, width: int, mode: str = "RGB") -> Image.Image:
    """Smooth noise with edges, in every channel another."""
    random = np.random.default_rng(height * 10_000 + width)
    channels = {"RGB": 3, "CMYK": 4, "RGBA": 4}.get(mode, 1)
    small = random.integers(0, 256, (height // 8 + 2, width // 8 + 2, channels), dtype=np.uint8)
    layers = [
        np.asarray(
            Image.fromarray(small[:, :, c]).resize((width, height), Image.Resampling.BICUBIC)
        )
        for c in range(channels)
    ]
    pixels = np.stack(layers, axis=-1)
    pixels[height // 3 : height // 2, width // 4 : width // 2] = 250
    return Image.fromarray(pixels.squeeze() if channels == 1 else pixels, mode)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


SIXTEEN = np.random.default_rng(0).integers(0, 2**16, (33, 47), dtype=np.uint16)


def rotated_by_exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    return encoded(photograph(33, 47), "JPEG", exif=exif)


FILES = {
    "jpeg": encoded(photograph(33, 47), "JPEG", quality=90),
    "odd sides, subsampled": encoded(photograph(31, 45), "JPEG", quality=60, subsampling=2),
    "no subsampling": encoded(photograph(33, 47), "JPEG", subsampling=0),
    "progressive": encoded(photograph(64, 80), "JPEG", progressive=True),
    "grey jpeg": encoded(photograph(33, 47, "L"), "JPEG"),
    "cmyk jpeg": encoded(photograph(33, 47, "CMYK"), "JPEG"),
    "jpeg of rgb": encoded(photograph(33, 47), "JPEG", keep_rgb=True),
    "restart markers": encoded(photograph(64, 80), "JPEG", restart_marker_blocks=2),
    "exif": rotated_by_exif(),
    "long comment": encoded(photograph(33, 47), "JPEG", comment=b"\xff\xc0" * 400),
    "png": encoded(photograph(33, 47), "PNG"),
    "palette": encoded(photograph(33, 47).quantize(16), "PNG"),
    "transparent": encoded(photograph(33, 47, "RGBA"), "PNG"),
    "16 bits": encoded(Image.fromarray(SIXTEEN), "PNG"),
    "1 bit": encoded(photograph(33, 47).convert("1"), "PNG"),
    "webp": encoded(photograph(33, 47), "WEBP", quality=80),
    "bmp": encoded(photograph(33, 47), "BMP"),
    "gif": encoded(photograph(33, 47).quantize(16), "GIF"),
    "tiff": encoded(photograph(33, 47), "TIFF"),
    "one pixel": encoded(photograph(1, 1), "JPEG"),
}


@pytest.mark.parametrize("name", FILES)
def test_pixels_are_pillows(name):
    expected = np.asarray(Image.open(io.BytesIO(FILES[name])).convert("RGB"))
    if name == "16 bits":  # which Pillow cuts at 255
        expected = np.rint(SIXTEEN / 257).astype(np.uint8)[..., None].repeat(3, axis=2)
    image, height, width = decode_image(FILES[name])
    assert (height, width) == expected.shape[:2] == image.shape[1:]
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("times", [1.5, 3.9, 4.1, 6.0, 8.3, 20.0])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_much_larger_image_is_decoded_smaller_and_looks_the_same(times, mode):
    height, width = 901, 1203
    data = encoded(photograph(height, width, mode), "JPEG", quality=92)
    needed = (int(height / times), int(width / times))
    image, true_height, true_width = decode_image(data, needed)
    assert (true_height, true_width) == (height, width)
    assert tuple(image.shape[1:]) == (needed if times >= 4 else (height, width))
    resized = F.resize(image[None], list(needed), antialias=True)[0].permute(1, 2, 0).numpy()
    whole = Image.open(io.BytesIO(data)).convert("RGB")
    expected = np.asarray(whole.resize(needed[::-1], Image.Resampling.BILINEAR), dtype=float)
    assert np.abs(resized - expected).mean() < 2


def test_other_formats_are_decoded_whole():
    image, _, _ = decode_image(FILES["png"], (4, 5))
    assert image.shape == (3, 33, 47)


@pytest.mark.parametrize("name", ["jpeg", "progressive", "grey jpeg", "cmyk jpeg", "png", "webp"])
@pytest.mark.parametrize("kept", [0.02, 0.3, 0.6, 0.9])
def test_a_truncated_file_is_an_error(name, kept):
    data = FILES[name]
    with pytest.raises(ValueError, match=r"."):
        decode_image(data[: int(len(data) * kept)])


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(FILES)), st.data())
def test_damage_anywhere_gives_an_image_or_an_error(name, data):
    content = bytearray(FILES[name])
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    try:
        image, height, width = decode_image(bytes(content))
    except ValueError:
        return
    assert tuple(image.shape) == (3, height, width)


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff\xd8", b"\xff\xd8\xff\xc0", b"not an image", b"\xff\xd8" + b"\xff" * 50,
     b"\x89PNG\r\n\x1a\n" + b"\0" * 40, FILES["jpeg"][:20] + b"\0" * 600],
)  # fmt: skip
def test_what_is_no_image_is_an_error(data):
    with pytest.raises(ValueError, match=r"."):
        decode_image(data)


def test_a_header_that_promises_far_too_much_is_an_error():
    huge = bytearray(FILES["png"])
    huge[16:24] = (60_000).to_bytes(4, "big") * 2  # width and height
    huge[29:33] = zlib.crc32(bytes(huge[12:29])).to_bytes(4, "big")
    with pytest.raises(ValueError, match="decompression bomb"):
        decode_image(bytes(huge))
