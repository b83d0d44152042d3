"""A JPEG that is damaged before its end: trained on as decoders read it, and told by name."""

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.data.batch import decode
from pipeline.data.images import decode_image
from pipeline.data.shards import Sample
from pipeline.errors import UserError

PICTURE = Image.fromarray(
    np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
).resize((320, 240))


def jpeg(mode: str = "RGB", **options) -> bytes:
    file = io.BytesIO()
    PICTURE.convert(mode).save(file, "JPEG", quality=90, **options)
    return file.getvalue()


KINDS = {
    "baseline": jpeg(),
    "progressive": jpeg(progressive=True),
    "restart markers": jpeg(restart_marker_rows=1),
    "with a thumbnail": jpeg(exif=b"Exif\0\0" + jpeg()[:2000] + b"\xff\xd9"),
}


def zeroed(whole: bytes) -> bytes:
    """Without its third quarter."""
    quarter = len(whole) // 4
    return whole[: 2 * quarter] + bytes(quarter) + whole[3 * quarter :]


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_data_gives_pillows_pixels_and_libjpegs_words(kind):
    whole, told = KINDS[kind], []
    data = zeroed(whole)
    image, height, width = decode_image(data, warn=told.append)
    assert (height, width) == (240, 320)
    assert len(told) == 1
    assert told[0].startswith("Corrupt JPEG data: ")
    with Image.open(io.BytesIO(data)) as expected:
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), np.asarray(expected))
    assert not np.array_equal(image.numpy(), decode_image(whole, warn=told.append)[0].numpy())
    assert len(told) == 1  # nothing of the whole one


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("needed", [None, (60, 80)])
def test_damage_of_a_cmyk_file_is_told_too(progressive, needed):
    whole, told = jpeg("CMYK", progressive=progressive), []
    decode_image(whole, needed, told.append)
    decode_image(whole + b"behind the end", needed, told.append)
    assert not told
    image, height, width = decode_image(zeroed(whole), needed, told.append)
    assert (image.shape[1:], height, width) == (needed or (240, 320), 240, 320)
    assert len(told) == 1
    assert told[0].startswith("Corrupt JPEG data: ")


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_told_where_the_file_is_decoded_smaller(kind):
    told = []
    image, height, width = decode_image(zeroed(KINDS[kind]), (60, 80), told.append)
    assert (tuple(image.shape), height, width) == ((3, 60, 80), 240, 320)
    assert len(told) == 1
    assert told[0].startswith("Corrupt JPEG data: ")


def test_a_header_that_pillow_does_not_take_is_no_matter_whatever_the_size():
    whole = KINDS["baseline"]
    data = whole[:2] + b"\xff\xe0\0\x07JFIF\0" + whole[20:]
    for needed in (None, (200, 300), (60, 80)):
        expected = decode_image(whole, needed)[0]
        np.testing.assert_array_equal(decode_image(data, needed)[0].numpy(), expected.numpy())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept", [0.75, 0.97])
def test_a_file_without_its_end_is_an_error_in_libjpegs_words(kind, kept):
    told = []
    data = KINDS[kind][: int(len(KINDS[kind]) * kept)]
    with pytest.raises(ValueError, match=r"damaged or cut off \(.*[Pp]remature end of "):
        decode_image(data, warn=told.append)
    assert not told


def test_a_failure_after_a_warning_is_an_error():
    """simplejpeg takes it for a warning when it is asked to go on, with rows that nothing wrote."""
    whole = KINDS["baseline"]
    middle = len(whole) // 2
    data = whole[:middle] + b"\xff\xc4\0\x05" + b"\xff" * 9 + bytes(200) + whole[middle + 213 :]
    told = []
    with pytest.raises(ValueError, match="damaged or cut off"):
        decode_image(data, warn=told.append)
    assert not told


@pytest.mark.parametrize(
    "odd",
    [
        pytest.param(lambda whole: whole.replace(b"JFIF\0\1", b"JFIF\0\3"), id="JFIF 3"),
        pytest.param(lambda whole: whole + b"behind the end", id="bytes behind the end"),
        pytest.param(lambda whole: whole[:-2] + b"\x5a" * 12 + whole[-2:], id="webcam's padding"),
        pytest.param(
            lambda whole: whole[:2] + b"\xff\xe2\0\x12ICC_PROFILE\0\x05\x02AB" + whole[2:],
            id="colour profile",
        ),
    ],
)
def test_what_leaves_the_pixels_as_they_are_is_not_told(odd):
    whole, told = KINDS["baseline"], []
    data = odd(whole)
    assert data != whole
    image = decode_image(data, warn=told.append)[0]
    np.testing.assert_array_equal(image.numpy(), decode_image(whole)[0].numpy())
    assert not told


def test_training_names_the_image(capfd):
    record = {"id": 17, "file_name": "a/b.jpg", "width": 320, "height": 240}
    decode(Sample(zeroed(KINDS["baseline"]), record, []), {})
    out, err = capfd.readouterr()
    assert not out
    assert err.startswith(
        "image 17 (a/b.jpg) is damaged, and some of its pixels are wrong: Corrupt"
    )
    assert err.count("\n") == 1
    with pytest.raises(UserError, match=r"image 17 \(a/b.jpg\) cannot be decoded: got a file of"):
        decode(Sample(KINDS["baseline"][:3000], record, []), {})
