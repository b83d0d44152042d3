"""What convert takes is what training reads: formats and kinds of pixels."""

import io

import numpy as np
import pytest
from PIL import Image

from data_prep import checks
from data_prep.convert import convert
from data_prep.manifest import read_manifest
from data_prep.verify import DAMAGE, verify
from pipeline.data import images
from pipeline.data.colours import WHITE

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I;16")
GREY = {
    "16 bits": np.array([[0, WHITE]] * 2, np.int32),
    "beyond 16 bits": np.array([[0, WHITE + 1]] * 2, np.int32),
    "below black": np.array([[-1, 5]] * 2, np.int32),
    "floating point": np.array([[0, 1]] * 2, np.float32),
}


def pictures() -> dict[str, Image.Image]:
    found = {mode: Image.new(mode, (8, 6)) for mode in MODES}
    return found | {name: Image.fromarray(values) for name, values in GREY.items()}


def every_file() -> dict[str, bytes]:
    """Of every format that Pillow writes, with every kind of pixels that it writes there."""
    Image.init()
    files = {}
    for kind in sorted(Image.SAVE):
        for name, picture in pictures().items():
            file = io.BytesIO()
            try:
                picture.save(file, kind)
            except (OSError, ValueError, KeyError, TypeError, SystemError):
                continue  # not written there
            files[f"{kind}, {name}"] = file.getvalue()
    return files


def test_the_lists_are_those_of_training():
    assert set(checks.FORMATS) == set(images.FORMATS)
    assert set(checks.EXTENSIONS) == {*images.FORMATS, "MPO"}
    assert checks.WHITE == WHITE


def test_a_file_is_taken_exactly_where_training_reads_it():
    taken, refused = set(), set()
    for name, data in every_file().items():
        try:
            images.decode_image(data)
        except ValueError:
            refused.add(name)
            with pytest.raises(checks.UnsupportedImage):
                checks.read_image_header(data)
        else:
            taken.add(name)
            assert checks.read_image_header(data)[1:] in ((8, 6), (2, 2)), name
    assert {name.partition(",")[0] for name in taken} >= set(images.FORMATS)
    assert {name.partition(",")[0] for name in refused} >= {"EPS", "ICO", "TGA", "TIFF"}
    assert {f"TIFF, {name}" for name in GREY if name != "16 bits"} <= refused
    assert "TIFF, 16 bits" in taken


def test_what_training_refuses_is_left_out_and_named(small):
    content = small(7)
    files = every_file()
    refused = ["EPS, RGB", "TGA, RGB", "ICO, RGBA", "TIFF, floating point", "TIFF, beyond 16 bits"]
    for number, name in enumerate(refused):
        (small.images / f"{number}.jpg").write_bytes(files[name])
    (small.images / "5.jpg").write_bytes(files["JPEG, RGB"][:3] + b"\xff" * 9)
    small.save(content)
    found = {p.image_id: p for p in convert(*small.arguments).problems}
    kinds = [found[10 + number].kind for number in range(6)]
    assert kinds == ["unsupported image"] * 5 + ["corrupt image"]
    assert "starts with b'%!PS" in found[10].detail
    assert "expected JPEG, PNG" in found[12].detail
    assert "floating point" in found[13].detail
    assert f"0 to {WHITE + 1}" in found[14].detail
    assert list(read_manifest(small.output).samples["id"]) == [16]


def test_verify_names_what_an_earlier_convert_took(small, monkeypatch):
    content = small(2)
    (small.images / "0.jpg").write_bytes(every_file()["TIFF, floating point"])
    content["images"][0] |= {"width": 2, "height": 2}
    content["annotations"][0]["bbox"] = [0, 0, 2, 2]
    small.save(content)
    with monkeypatch.context() as before:
        before.setattr(
            checks, "_header", lambda i: checks.ImageHeader(checks.EXTENSIONS[i.format], *i.size)
        )
        assert convert(*small.arguments).problems == []
    (problem,) = verify(small.output)
    assert (problem.kind, problem.image_id) == ("unsupported image", 10)
    assert problem.kind in DAMAGE
