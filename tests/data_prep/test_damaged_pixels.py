"""Damage that decoders keep quiet about is found, and what only looks like damage is not."""

import io
from functools import cache
from random import Random

import numpy as np
import pytest
from PIL import Image

from data_prep import checks
from data_prep.checks import decode_image, read_image_header
from data_prep.convert import convert
from data_prep.verify import DAMAGE, verify
from pipeline.data import images as training

KINDS = {
    "baseline": ("RGB", {}),
    "progressive": ("RGB", {"progressive": True}),
    "optimised": ("RGB", {"optimize": True}),
    "not subsampled": ("RGB", {"subsampling": 0}),
    "stored as RGB": ("RGB", {"keep_rgb": True}),
    "restart markers": ("RGB", {"restart_marker_rows": 1}),
    "grey": ("L", {}),
    "CMYK": ("CMYK", {}),
}


@cache
def photograph(seed: int, mode: str = "RGB", size: tuple[int, int] = (320, 240)) -> Image.Image:
    """Noise at several scales."""
    noise = np.random.default_rng(seed)
    layers = [
        Image.fromarray(noise.integers(0, 256, (side, side, 3), dtype=np.uint8)).resize(size)
        for side in (4, 16, 64)
    ]
    mean = np.mean([np.asarray(layer, np.float32) for layer in layers], axis=0)
    return Image.fromarray(mean.astype(np.uint8)).convert(mode)


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def jpeg(picture: Image.Image, **options) -> bytes:
    return encoded(picture, "JPEG", **{"quality": 90} | options)


def damaged(whole: bytes, other: bytes) -> dict[str, bytes]:
    middle = len(whole) // 2
    zeros = bytes(len(whole) // 2)
    garbage = Random(0).randbytes(4096)
    return {
        "the middle half zeroed": whole[: middle // 2] + zeros + whole[middle // 2 + len(zeros) :],
        "cut, with an end marker": whole[:middle] + b"\xff\xd9",
        "garbage": whole[:middle] + garbage + whole[middle + 4096 :],
        "an end marker in the middle": whole[:middle] + b"\xff\xd9" + whole[middle:],
        "halves of two files": whole[:middle] + other[len(other) // 2 :],
    }


def pixels(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


def training_reads(data: bytes) -> bool:
    try:
        training.decode_image(data)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_damage_in_the_middle_of_a_jpeg_is_found_by_decoding(kind):
    mode, options = KINDS[kind]
    whole, other = (jpeg(photograph(seed, mode), **options) for seed in (0, 1))
    decode_image(whole)
    silent = 0
    for name, data in damaged(whole, other).items():
        with pytest.raises(ValueError, match=rf"\({len(data)} bytes\)"):
            decode_image(data)
        if training_reads(data):
            silent += 1
            assert read_image_header(data).width == 320
            assert not np.array_equal(pixels(data), pixels(whole)), name
    assert silent >= 3


def segment(marker: int, content: bytes) -> bytes:
    return bytes((0xFF, marker)) + (len(content) + 2).to_bytes(2) + content


def thumbnailed(whole: bytes) -> bytes:
    return whole[:2] + segment(0xE1, b"Exif\0\0" + jpeg(photograph(2, size=(32, 24)))) + whole[2:]


def with_other_scan_parameters(whole: bytes) -> bytes:
    """Those that mean nothing in a sequential file, as some cameras write them."""
    scan = whole.index(b"\xff\xda")
    end = scan + 2 + int.from_bytes(whole[scan + 2 : scan + 4])
    assert whole[end - 3 : end] == b"\0\x3f\0"
    return whole[: end - 3] + bytes(3) + whole[end:]


def before_tables(whole: bytes, what: bytes) -> bytes:
    tables = whole.index(b"\xff\xdb")
    return whole[:tables] + what + whole[tables:]


HARMLESS = {
    "bytes behind the end": lambda whole: whole + b"trailing" * 99,
    "another file behind the end": lambda whole: whole + whole,
    "padding before the end": lambda whole: whole[:-2] + b"\x5a" * 12 + whole[-2:],
    "EXIF with a thumbnail": thumbnailed,
    "a damaged colour profile": lambda whole: before_tables(
        whole, segment(0xE2, b"ICC_PROFILE\0\x05\x02AB")
    ),
    "a JFIF version of the future": lambda whole: whole.replace(b"JFIF\0\1", b"JFIF\0\3"),
    "a comment": lambda whole: before_tables(whole, segment(0xFE, b"\xff\xd9" * 9)),
    "bytes between segments": lambda whole: before_tables(whole, b"junk"),
    "fill bytes": lambda whole: before_tables(whole, b"\xff" * 7),
    "other scan parameters": with_other_scan_parameters,
}


@pytest.mark.parametrize("what", HARMLESS)
def test_what_does_not_touch_the_pixels_is_no_damage(what):
    whole = jpeg(photograph(0))
    data = HARMLESS[what](whole)
    assert data != whole
    assert np.array_equal(pixels(data), pixels(whole))
    assert read_image_header(data) == ("jpg", 320, 240)
    decode_image(data)


def test_more_bytes_before_the_end_than_padding_are_damage():
    """Zeros decode to more pixels than what was there before, so that coded data is left over."""
    whole = jpeg(photograph(0))
    with pytest.raises(ValueError, match=r"\d\d extraneous bytes before marker 0xd9"):
        decode_image(whole[:-2] + b"\x5a" * 30 + whole[-2:])


@pytest.mark.parametrize("size", [(1, 1), (7, 3), (17, 9), (65, 1), (1, 200), (333, 251)])
@pytest.mark.parametrize("kind", KINDS)
def test_whole_files_of_every_kind_and_size_are_taken(kind, size):
    mode, options = KINDS[kind]
    data = jpeg(photograph(3, mode, size), **options)
    decode_image(data)
    assert read_image_header(data) == ("jpg", *size)


def test_a_file_of_several_pictures_is_taken_and_its_first_one_judged():
    """MPO, as cameras write it: training reads the first picture."""
    first, second = photograph(0), photograph(1)
    whole = encoded(first, "MPO", quality=90, save_all=True, append_images=[second])
    assert Image.open(io.BytesIO(whole)).format == "MPO"
    decode_image(whole)
    place = len(jpeg(first)) // 2
    cut = whole[:place] + bytes(2000) + whole[place + 2000 :]
    with pytest.raises(ValueError, match="Corrupt JPEG data"):
        decode_image(cut)


def test_drawn_pictures_are_no_damage(drawn):
    files = sorted((drawn / "val").iterdir())
    assert len(files) == 40
    for path in files:
        decode_image(path.read_bytes())


@pytest.fixture
def five(small):
    """Image ids 11 to 15 have the five kinds of damage, 10 and 16 none."""
    content = small(7)
    whole = [jpeg(photograph(seed)) for seed in range(3)]
    files = [whole[1], *damaged(whole[0], whole[1]).values(), whole[2]]
    for number, data in enumerate(files):
        (small.images / f"{number}.jpg").write_bytes(data)
        content["images"][number] |= {"width": 320, "height": 240}
    small.save(content)
    return small


def test_convert_and_verify_find_damaged_pixels_when_they_decode(five):
    assert convert(*five.arguments).problems == []
    assert verify(five.output) == []
    found = verify(five.output, decode=True)
    assert {(p.kind, p.image_id) for p in found} == {("corrupt image", i) for i in range(11, 16)}
    assert {p.kind for p in found} <= DAMAGE
    result = convert(five.images, five.annotations, five.output.with_name("whole"), decode=True)
    assert {(p.kind, p.image_id) for p in result.problems} == {
        ("corrupt image", number) for number in range(11, 16)
    }
    assert sorted(result.manifest.samples["id"]) == [10, 16]
    assert {row["image_id"] for row in result.manifest.quarantined} == set(range(11, 16))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_decoding_gives_the_same_shards_whoever_does_it_and_after_a_restart(five):
    options = {"decode": True, "samples_per_shard": 2}
    convert(*five.arguments, **options)
    images, annotations, output = five.arguments
    convert(images, annotations, output.with_name("workers"), workers=3, **options)
    assert contents(output.with_name("workers")) == contents(output)

    stopped = output.with_name("stopped")
    with pytest.raises(ValueError, match="--strict: 5 problems"):
        convert(images, annotations, stopped, strict=True, **options)
    (stopped / "shard-000001.tar").unlink()
    with pytest.raises(ValueError, match="unfinished conversion of other input or options"):
        convert(images, annotations, stopped, samples_per_shard=2)
    convert(images, annotations, stopped, **options)
    assert contents(stopped) == contents(output)

    assert not convert(images, annotations, stopped, **options).fresh
    with pytest.raises(ValueError, match="differs in: options"):
        convert(images, annotations, stopped, samples_per_shard=2)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_cut_files_of_formats_without_an_end_marker_are_left_out(small):
    """Half of each, of which training would end."""
    formats = [name for name in checks.FORMATS if name not in ("JPEG", "PNG")]
    content = small(len(formats) + 1)
    for number, kind in enumerate(formats):
        options = {"compression": "tiff_lzw"} if kind == "TIFF" else {}
        whole = encoded(photograph(number, size=(40, 30)), kind, **options)
        assert training_reads(whole)
        assert read_image_header(whole)[1:] == (40, 30)
        for share in (0.5, 0.9):
            half = whole[: int(len(whole) * share)]
            assert not training_reads(half), (kind, share)
            with pytest.raises(ValueError, match=r"\(\d+ bytes\)"):
                read_image_header(half)
        (small.images / f"{number}.jpg").write_bytes(half)
    small.save(content)
    result = convert(*small.arguments)
    left = {(p.kind, p.image_id) for p in result.problems}
    assert left == {("corrupt image", 10 + number) for number in range(len(formats))}
    assert list(result.manifest.samples["id"]) == [10 + len(formats)]


def test_verify_finds_cut_files_that_an_earlier_convert_took(small, monkeypatch):
    small(2)
    whole = encoded(photograph(0, size=(40, 30)), "BMP")
    (small.images / "0.jpg").write_bytes(whole[: len(whole) // 2])
    with monkeypatch.context() as before:
        before.setattr(checks, "_WITH_END", checks.FORMATS)
        assert convert(*small.arguments).problems == []
    (problem,) = verify(small.output)
    assert (problem.kind, problem.image_id) == ("corrupt image", 10)


def blank(width: int, height: int) -> bytes:
    """A JPEG file of a few kilobytes and any size: one picture row of blocks, and no more."""
    data = bytearray(jpeg(Image.new("L", (16, 16))))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = height.to_bytes(2) + width.to_bytes(2)
    return bytes(data)


def grey_map(width: int, height: int) -> bytes:
    return b"P5 %d %d 255\n" % (width, height)


def test_the_limit_of_pixels_is_that_of_training(small):
    assert checks.MOST_PIXELS == training.MOST_PIXELS == 178_956_970
    # Training takes a picture of 96 million pixels, which PIL warns of.
    large = jpeg(Image.new("L", (12000, 8000)), quality=20)
    assert training_reads(large)
    decode_image(large)
    assert read_image_header(large) == ("jpg", 12000, 8000)
    assert read_image_header(blank(17895, 10000)) == ("jpg", 17895, 10000)
    for data in (blank(17896, 10000), grey_map(17896, 10000)):
        assert not training_reads(data)
        with pytest.raises(checks.UnsupportedImage) as refused:
            read_image_header(data)
        line = str(refused.value)
        assert "178960000 pixels" in line
        assert "178956970 pixels" in line
        assert "make the image smaller" in line

    content = small(2)
    (small.images / "0.jpg").write_bytes(blank(17896, 10000))
    small.save(content)
    (problem,) = convert(*small.arguments).problems
    assert (problem.kind, problem.image_id) == ("unsupported image", 10)


@pytest.mark.parametrize("name", ["_DAMAGE", "_PADDING", "_MOST_PADDING", "MOST_PIXELS"])
def test_training_judges_as_convert_does(name):
    """Neither package may import the other."""
    assert getattr(training, name) == getattr(checks, name)
