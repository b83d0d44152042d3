"""Decoding: whatever the format, Pillow's pixels; damage named; much too large decoded smaller."""

import io
import zlib
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as F

from pipeline.data.images import decode_as_shown, decode_image


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
    "jpeg 2000": encoded(photograph(33, 47), "JPEG2000"),
    "avif": encoded(photograph(33, 47), "AVIF"),
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


@pytest.mark.parametrize("size", [(901, 1203), (8, 8), (7, 4), (65, 9), (250, 17)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_reduced_image_is_pillows_draft_resized(size, mode):
    data = encoded(photograph(*size, mode), "JPEG", quality=92)
    needed = (size[0] // 4, size[1] // 4)
    whole = Image.open(io.BytesIO(data))
    _, (_, _, width, height) = whole.draft("RGB", (size[1] // 2, size[0] // 2))
    expected = whole.convert("RGB").resize(
        needed[::-1], Image.Resampling.BILINEAR, (0, 0, width, height)
    )
    image = decode_image(data, needed)[0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(image, np.asarray(expected))


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
    [b"", FILES["avif"][:-900], b"\xff\xd8", b"\xff\xd8\xff\xc0", b"not an image",
     b"\xff\xd8" + b"\xff" * 50, b"\x89PNG\r\n\x1a\n" + b"\0" * 40,
     FILES["jpeg"][:20] + b"\0" * 600],
)  # fmt: skip
def test_what_is_no_image_is_an_error(data):
    with pytest.raises(ValueError, match=r"."):
        decode_image(data)


@pytest.mark.parametrize("name", ["jpeg", "progressive", "grey jpeg", "png", "webp", "tiff", "gif"])
def test_a_damaged_file_is_told_the_same_way_each_time(name):
    """By its first bytes and what is expected; not by an address, or a line of a decoder."""
    cut = FILES[name][: len(FILES[name]) // 2]
    said = []
    for _ in range(2):
        with pytest.raises(ValueError, match="expected a whole file of JPEG, PNG") as told:
            decode_image(bytes(bytearray(cut)))
        said.append(str(told.value))
    assert said[0] == said[1]
    assert f"starts with {cut[:12]!r}" in said[0]
    assert f"{len(cut)} bytes" in said[0]
    assert "copy it again" in said[0]


def test_addresses_and_lines_of_decoders_are_left_out(monkeypatch):
    """Those that decoders put into what they say."""
    monkeypatch.setattr(
        "pipeline.data.images.to_rgb",
        Mock(side_effect=OSError("cannot identify image file <_io.BytesIO object at 0x7f12ab>")),
    )
    with pytest.raises(
        ValueError, match=r"cannot identify image file <_io.BytesIO object>"
    ) as told:
        decode_image(FILES["png"])
    assert "0x7" not in str(told.value)
    no_table = FILES["jpeg"].replace(b"\xff\xdb", b"\xff\xfe")  # its tables as comments
    with pytest.raises(ValueError, match=r"cut off \(Quantization table 0x00 was not defined\)"):
        decode_image(no_table)


def test_a_header_that_promises_far_too_much_is_an_error():
    huge = bytearray(FILES["png"])
    huge[16:24] = (60_000).to_bytes(4, "big") * 2  # width and height
    huge[29:33] = zlib.crc32(bytes(huge[12:29])).to_bytes(4, "big")
    with pytest.raises(ValueError, match="decompression bomb"):
        decode_image(bytes(huge))


@pytest.mark.parametrize("marker", [b"\xff\x00", b"\xff\x01", b"\xff\xd0", b"\xff\xd7"])
def test_the_size_is_read_where_libjpeg_reads_it(marker):
    """The marker has no length. Were what follows it one, it would lead to another frame."""
    whole = FILES["no subsampling"]
    frame = whole.index(b"\xff\xc0")
    other = whole[frame : frame + 10]
    comment = b"\xff\xe5\xff\xff" + bytes(0xFFE5 - 4) + other + bytes(0xFFFF + 2 - 0xFFE5 - 10)
    huge = whole[: frame + 5] + (20_000).to_bytes(2) * 2 + whole[frame + 9 :]
    decode_image(whole[:2] + marker + comment + whole[2:])
    with pytest.raises(ValueError, match="decompression bomb"):
        decode_image(whole[:2] + marker + comment + huge[2:])


# Colours, against what each format means


def rgb(data: bytes) -> np.ndarray:
    return decode_image(data)[0].permute(1, 2, 0).numpy()


def solid(mode: str, colour, kind: str, **options) -> np.ndarray:
    """The decoded RGB of a file of one colour, of which the JPEG ones are within a few."""
    return rgb(encoded(Image.new(mode, (16, 16), colour), kind, **options))[8, 8].astype(int)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_keep_their_contrast(kind):
    values = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    file = Image.fromarray(values) if kind != "PPM" else Image.fromarray(values.astype(np.int32))
    data = encoded(file, kind)
    expected = np.floor(values / 257 + 0.5)
    for channel in range(3):
        np.testing.assert_array_equal(rgb(data)[..., channel], expected)


def test_big_endian_tiff_of_sixteen_bits():
    values = np.array([[0, 257], [128 * 257, 65535]], dtype=">u2")
    entries = [(256, 2), (257, 2), (258, 16), (259, 1), (262, 1), (273, 0), (277, 1), (279, 8)]
    at = 8 + 2 + 12 * len(entries) + 4
    head = b"MM\0*" + (8).to_bytes(4) + len(entries).to_bytes(2)
    for tag, value in entries:
        head += tag.to_bytes(2) + (4).to_bytes(2) + (1).to_bytes(4)
        head += (at if tag == 273 else value).to_bytes(4)
    data = head + bytes(4) + values.tobytes()
    np.testing.assert_array_equal(rgb(data)[..., 0], [[0, 1], [128, 255]])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.full((4, 4), 70_000, np.int32), "70000, expected 0 to 65535"),
        (np.full((4, 4), -1, np.int32), "-1 to -1"),
        (np.full((4, 4), 0.5, np.float32), "floating point"),
    ],
)
def test_grey_without_a_known_white_is_refused(values, said):
    with pytest.raises(ValueError, match=said):
        decode_image(encoded(Image.fromarray(values), "TIFF"))


def test_cmyk_jpegs_are_inverted_and_tiffs_are_not():
    """As Adobe writes them: ink of 0 is stored as 255 in a JPEG."""
    cmyk = {"red": (0, 255, 255, 0), "cyan": (255, 0, 0, 0), "dark": (0, 0, 0, 200)}
    expected = {"red": (255, 0, 0), "cyan": (0, 255, 255), "dark": (55, 55, 55)}
    for name, colour in cmyk.items():
        np.testing.assert_array_equal(solid("CMYK", colour, "TIFF"), expected[name])
        jpeg = solid("CMYK", colour, "JPEG", quality=95)
        assert np.abs(jpeg - expected[name]).max() <= 4, (name, jpeg)
    ink = np.asarray(photograph(40, 56, "CMYK"))
    paper = (255 - ink[..., :3].astype(float)) * (255 - ink[..., 3:].astype(float)) / 255
    got = rgb(encoded(Image.fromarray(ink, "CMYK"), "TIFF"))
    assert np.abs(got - paper).max() <= 1


def test_transparency_is_dropped_and_not_laid_on_anything():
    rgba = np.array(photograph(20, 30, "RGBA"))
    rgba[:10, :, 3] = 0
    for kind in ("PNG", "TIFF"):
        np.testing.assert_array_equal(
            rgb(encoded(Image.fromarray(rgba, "RGBA"), kind)), rgba[..., :3]
        )
    grey = np.array([[[7, 0], [200, 255]]], dtype=np.uint8)
    assert rgb(encoded(Image.fromarray(grey, "LA"), "PNG"))[..., 1].tolist() == [[7, 200]]


@pytest.mark.parametrize("transparency", [1, b"\x00\x80\xff"])
def test_a_palette_is_looked_up_where_it_is_transparent_too(transparency, recwarn):
    image = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    data = encoded(image, "PNG", transparency=transparency)
    assert rgb(data).tolist() == [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]
    assert not recwarn.list


def test_of_an_animation_the_first_frame():
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert rgb(data)[3, 3].tolist() == [255, 0, 0], kind


def test_one_bit_is_black_and_white():
    assert set(np.unique(rgb(FILES["1 bit"]))) == {0, 255}


def test_programs_are_not_images():
    """Pillow runs Ghostscript for these."""
    with pytest.raises(ValueError, match=r"starts with b'%!PS-Adobe"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")


def test_a_jpeg_that_promises_far_too_much_is_an_error():
    huge = bytearray(FILES["jpeg"])
    at = huge.index(b"\xff\xc0")
    huge[at + 5 : at + 9] = (65_000).to_bytes(2) * 2
    for decode in (decode_image, decode_as_shown):
        with pytest.raises(ValueError, match="decompression bomb"):
            decode(bytes(huge))


# Orientation


def oriented(image: Image.Image, orientation: int, kind: str, **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, kind, exif=exif, **options)


def corners(pixels: np.ndarray) -> list[int]:
    """Red at the corners: upper left, upper right, lower left, lower right."""
    return [int(pixels[y, x, 0]) for y in (0, -1) for x in (0, -1)]


@pytest.mark.parametrize(
    ("orientation", "shown"),
    # By EXIF: where the stored first row and first column are when the picture is looked at.
    [
        (1, [1, 2, 3, 4]), (2, [2, 1, 4, 3]), (3, [4, 3, 2, 1]), (4, [3, 4, 1, 2]),
        (5, [1, 3, 2, 4]), (6, [3, 1, 4, 2]), (7, [4, 2, 3, 1]), (8, [2, 4, 1, 3]),
        (0, [1, 2, 3, 4]), (9, [1, 2, 3, 4]),
    ],
)  # fmt: skip
def test_an_image_is_turned_as_its_orientation_says(orientation, shown):
    pixels = np.zeros((2, 3, 3), dtype=np.uint8)
    pixels[0, 0], pixels[0, 2], pixels[1, 0], pixels[1, 2] = 10, 20, 30, 40
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        data = oriented(Image.fromarray(pixels), orientation, kind, **options)
        image, height, width = decode_as_shown(data)
        assert [value // 10 for value in corners(image.permute(1, 2, 0).numpy())] == shown
        assert (height, width) == tuple(image.shape[1:]) == ((3, 2) if orientation in range(5, 9)
                                                             else (2, 3))  # fmt: skip
        stored, height, width = decode_image(data)
        assert [v // 10 for v in corners(stored.permute(1, 2, 0).numpy())] == [1, 2, 3, 4]
        assert (height, width) == (2, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_turned_image_is_pillows(kind, orientation):
    data = oriented(photograph(33, 47), orientation, kind)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    image, height, width = decode_as_shown(data)
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), expected)
    assert (height, width) == expected.shape[:2]
    assert image[None].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("orientation", [1, 6, 7])
def test_a_much_larger_turned_image_is_decoded_smaller(orientation):
    data = oriented(photograph(900, 1200), orientation, "JPEG", quality=92)
    shown = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    asked = []

    def needed(size):
        asked.append(size)
        return size[0] // 6, size[1] // 6

    image, height, width = decode_as_shown(data, needed)
    assert asked == [(height, width)] == [shown.size[::-1]]
    assert tuple(image.shape[1:]) == (height // 6, width // 6)
    small = shown.resize((width // 6, height // 6), Image.Resampling.BILINEAR)
    difference = image.permute(1, 2, 0).numpy() - np.asarray(small, dtype=float)
    assert np.abs(difference).mean() < 2


def test_damaged_metadata_turn_nothing():
    good = oriented(photograph(33, 47), 6, "JPEG")
    at = good.index(b"Exif\0\0") + 6
    for damaged in (b"XX", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\0\0"):
        data = good[:at] + damaged + good[at + len(damaged) :]
        assert decode_as_shown(data)[0].shape == (3, 33, 47)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(FILES)), st.data())
def test_damage_anywhere_shows_an_image_or_an_error(name, data):
    content = bytearray(FILES[name])
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        image, height, width = decode_as_shown(bytes(content))
    except ValueError:
        return
    assert tuple(image.shape) == (3, height, width)
