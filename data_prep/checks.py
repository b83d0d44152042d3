"""What can be wrong with an image or an annotation, found cheaply and named.

A JPEG or PNG is judged by its header and its end marker, and decoded only on request.
"""

import io
import json
import math
import re
import struct
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from PIL import Image
from simplejpeg import decode_jpeg, decode_jpeg_header

Result = TypeVar("Result")

# PIL's name of a format that training reads -> the extension of the tar member. Others are refused:
# PIL would start helper programs for some of them.
EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",  # a JPEG with further pictures behind it, as some cameras write
    "PNG": "png",
    "WEBP": "webp",
    "BMP": "bmp",
    "TIFF": "tiff",
    "GIF": "gif",
    "PPM": "ppm",
    "JPEG2000": "jp2",
    "AVIF": "avif",
}
FORMATS = tuple(name for name in EXTENSIONS if name != "MPO")  # PIL opens MPO by way of JPEG
Image.init()  # all its readers are known by name from here on
WHITE = 65535  # the largest grey value that training takes
MOST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # from there on PIL refuses, and training, too
_JPEG = ("JPEG", "MPO")
_WITH_END = (*_JPEG, "PNG")  # formats of which a cut file is known without decoding it
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"  # the whole chunk; bytes that are none of the image may follow
# What libjpeg warns of when the coded data of a JPEG are damaged: in the words of its jerror.h.
_DAMAGE = ("Corrupt JPEG data", "Premature end of JPEG file", "Inconsistent progression sequence")
_PADDING = re.compile(r"(\d+) extraneous bytes before marker 0xd[0-79]$")  # restart, end
_MOST_PADDING = 16  # bytes: webcams write 1 to 4
# Published boxes stick out of their images by rounding; more than this is a mistake.
BOX_TOLERANCE = 1.0  # pixels
TURN_THE_FILES = (
    "turned by EXIF? Then turn the files (exiftran -ai, or jpegtran); the labels can stay as they "
    "are"
)
_FRAME = struct.Struct(">BHHB")  # of a JPEG: bits, height, width, channels
_LARGEST = sys.float_info.max
_NUMBERS = frozenset((int, float))  # types that JSON numbers have, and True has not


class Problem(NamedTuple):
    """One finding. The ids are None where the finding has none."""

    kind: str
    image_id: int | None
    annotation_id: Any
    detail: str


class TruncatedImage(ValueError):
    """An image file has a beginning and no end."""


class UnsupportedImage(ValueError):
    """An image file may be whole, and is not of a kind that training takes."""


class ImageHeader(NamedTuple):
    """Extension of the tar member without dot, and size in pixels as stored."""

    extension: str
    width: int
    height: int


def read_image_header(data: bytes) -> ImageHeader:
    """Format and size of an encoded image that has a beginning and an end.

    A format other than JPEG and PNG has no end that could be looked for: it is decoded.

    Raises:
        TruncatedImage: a JPEG or PNG is cut short.
        UnsupportedImage: of a format that training does not read, of more than MOST_PIXELS, or
            with pixels of which nothing says which value is white: floating point, and integers
            beyond 16 bits.
        ValueError: damaged.
    """
    size, scan = _jpeg_frame(data)
    if size is not None and size[0] * size[1] <= MOST_PIXELS:
        header = ImageHeader("jpg", *size)
    else:
        header = _with_image(data, _header)
    # In the coded part of a JPEG 0xFF is always escaped, so an end marker there is a real one.
    if header.extension == "jpg" and data.rfind(b"\xff\xd9", scan) < 0:
        raise TruncatedImage(f"no end-of-image marker in {len(data)} bytes")
    if header.extension == "png" and b"IEND" not in data[-64:] and _PNG_END not in data:
        raise TruncatedImage(f"no IEND chunk in {len(data)} bytes")
    return header


def decode_image(data: bytes) -> None:
    """Decode the whole image; of a JPEG, where decoders go on after damage, all coded data.

    Raises:
        ValueError: the decoder fails, or warns of damage.
    """

    def decode(image: Image.Image) -> None:
        if image.format in _JPEG:
            _decode_jpeg(data, image)
        else:
            image.load()

    _with_image(data, decode)


def _decode_jpeg(data: bytes, image: Image.Image) -> None:
    """Raise ValueError where the coded data are damaged; `image` is the opened file."""
    try:
        # Grey and at an eighth of the size libjpeg reads all coded data, and saves the rest.
        decode_jpeg(data, "GRAY", min_height=1, min_width=1, min_factor=8)
    except ValueError as warning:
        if _tells_damage(str(warning), data):
            raise
        image.load()


def _tells_damage(warning: str, data: bytes) -> bool:
    """Whether libjpeg's first warning is of more than metadata or a few bytes of padding."""
    padding = _PADDING.search(warning)
    if not warning.startswith(_DAMAGE) or (padding and int(padding[1]) <= _MOST_PADDING):
        return False
    try:
        decode_jpeg_header(data)
    except ValueError:  # it warned of the header, and what it could not read there it did not need
        return False
    return True


def _header(image: Image.Image) -> ImageHeader:
    if image.mode == "F":
        raise UnsupportedImage(
            f"grey values in floating point, expected 8 or 16 bits; scale them to 0 to {WHITE}"
        )
    if image.format not in _WITH_END:
        image.load()
    if image.mode == "I":  # rare, and the header does not tell: all pixels are looked at
        extrema: Any = image.getextrema()  # of one channel
        low, high = extrema
        if low < 0 or high > WHITE:
            raise UnsupportedImage(
                f"grey values {low} to {high}, expected 0 to {WHITE}; scale them to 16 bits"
            )
    return ImageHeader(EXTENSIONS[str(image.format)], *image.size)


def _begins_as_known(data: bytes) -> bool:
    """Whether the first bytes are those of a format that training reads."""
    accepts = [Image.OPEN[name][1] for name in FORMATS]
    return not data or any(accept and accept(data[:16]) for accept in accepts)


def _with_image(data: bytes, read: Callable[[Image.Image], Result]) -> Result:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PIL can live with is fine
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                return read(image)
    except UnsupportedImage:
        raise
    except Image.DecompressionBombError as error:  # tells the number of pixels, and the limit
        raise UnsupportedImage(f"{str(error).rstrip('.')}; make the image smaller") from None
    except Image.UnidentifiedImageError:
        if _begins_as_known(data):
            raise ValueError(f"a damaged header ({len(data)} bytes)") from None
        raise UnsupportedImage(
            f"not an image that training reads: starts with {data[:12]!r}, expected "
            f"{', '.join(FORMATS)}"
        ) from None
    except Exception as error:  # damaged files trip PIL's parsers in every way there is
        raise ValueError(f"{error or type(error).__name__} ({len(data)} bytes)") from None


def _jpeg_frame(data: bytes) -> tuple[tuple[int, int] | None, int]:
    """((width, height), where the coded part begins) of a JPEG, its own and not its thumbnail's.

    The size is None for what is not an ordinary JPEG: that is for PIL to judge. This is five
    times as fast as PIL, which also reads tables and metadata.
    """
    size = None
    position = 2 if data.startswith(b"\xff\xd8\xff") else len(data)
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xDA:
            return size, position
        if marker == 0xFF:  # a fill byte
            position += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD9:  # markers without content
            position += 2
        else:
            length = int.from_bytes(data[position + 2 : position + 4])
            if 0xC0 <= marker <= 0xC2:  # Huffman-coded: baseline, extended, progressive
                bits, height, width, channels = _FRAME.unpack_from(
                    data[position + 4 : position + 10].ljust(_FRAME.size, b"\0")
                )
                plain = bits == 8 and channels in (1, 3, 4) and width > 0 and height > 0
                size = (width, height) if plain else None
            position += 2 + length
    return None, position


def size_mismatch(recorded: tuple[Any, Any], actual: tuple[int, int], name: str) -> str | None:
    """What is wrong if a record gives another (width, height) than its file has."""
    if any(
        told is not None and (told != found or isinstance(told, bool))
        for told, found in zip(recorded, actual, strict=True)
    ):
        turned = f"; {TURN_THE_FILES}" if recorded == actual[::-1] else ""
        told = "x".join(f"{side!r:.40}" for side in recorded)
        return f"record says {told}, {name!r} is {actual[0]}x{actual[1]}{turned}"
    return None


def annotation_problems(
    annotation: dict[str, Any],
    size: tuple[float, float] | None = None,
    categories: Container[int] | None = None,
) -> Iterator[tuple[str, str]]:
    """Yield (kind, detail) of what is wrong with an annotation.

    Args:
        annotation: the record.
        size: of its image, (width, height) in pixels; without it, boxes are not compared to it.
        categories: the ids there are; without them, every integer is one.
    """
    category = annotation.get("category_id")
    # 1.0 and True equal 1 in Python, but are not ids.
    if type(category) is not int or (categories is not None and category not in categories):
        yield "unknown category", f"category_id {category!r:.60} is not in categories"
    if any(map(non_finite, annotation.values())):
        yield from record_problems(annotation)
    box = annotation.get("bbox")
    if not (isinstance(box, list) and len(box) == 4 and _NUMBERS.issuperset(map(type, box))):
        yield "no box", f"bbox is {box!r:.60}, expected [x, y, width, height]"
        return
    if non_finite(box):
        return
    x, y, width, height = box
    if width <= 0 or height <= 0:
        yield "degenerate box", f"bbox {box} has no area"
    elif size is not None and (
        min(x, y) < -BOX_TOLERANCE
        or x + width > size[0] + BOX_TOLERANCE
        or y + height > size[1] + BOX_TOLERANCE
    ):
        yield "box outside image", f"bbox {box} in an image of {size[0]}x{size[1]}"


def record_problems(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (kind, detail) of what is wrong with any record, of an image or an annotation."""
    for name, value in record.items():
        if non_finite(value):
            yield "non-finite number", f"{name:.60} is {value!r:.100}"


def header_problems(header: dict[str, Any]) -> Iterator[Problem]:
    """Yield what is wrong with the top-level members of an annotation file but its two lists."""
    for key, value in header.items():
        for row in value if isinstance(value, list) else [value]:
            record = row if isinstance(row, dict) else {key: row}
            for kind, detail in record_problems(record):
                yield Problem(kind, None, None, f"in {key}: {detail}")


def non_finite(value: Any) -> bool:
    """Whether a JSON value is or contains NaN, an infinity, or a number beyond the floats."""
    kind = type(value)
    if kind is int or kind is float:
        return not -_LARGEST <= value <= _LARGEST
    if kind is list:
        if not value or type(value[0]) is list:
            return any(map(non_finite, value))
        try:
            # Long lists of coordinates: a sum is finite only if every term is. It begins with a
            # float, because integers beyond the floats could cancel out.
            if math.isfinite(sum(value, 0.0)):
                return False
        except (TypeError, OverflowError):  # not all of them numbers, or too large
            pass
        return any(map(non_finite, value))
    return kind is dict and any(map(non_finite, value.values()))


def report(problems: Sequence[Problem]) -> bytes:
    """The findings as JSON: counts by kind, and one object each."""
    counts = dict(sorted(Counter(problem.kind for problem in problems).items()))
    rows = [problem._asdict() for problem in problems]
    return json.dumps({"counts": counts, "problems": rows}, indent=1).encode()


def read_report(content: bytes) -> list[Problem]:
    """The findings back; of earlier versions too, which wrote a list each."""
    rows = json.loads(content)["problems"]
    return [Problem(**row) if isinstance(row, dict) else Problem(*row) for row in rows]


def summary_table(problems: Iterable[Problem], examples: int = 5) -> str:
    """A table of problem kinds with counts and the first ids, images before annotations."""
    problems = list(problems)
    rows = [("problem", "count", "first ids")]
    for kind, count in sorted(Counter(problem.kind for problem in problems).items()):
        named = [
            f"annotation {problem.annotation_id}"
            if problem.annotation_id is not None
            else f"image {problem.image_id}"
            if problem.image_id is not None
            else problem.detail
            for problem in problems
            if problem.kind == kind
        ][:examples]
        rows.append((kind, str(count), ", ".join(named) + (", ..." if count > examples else "")))
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    table = "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c}" for a, b, c in rows)
    # A lone surrogate is legal in JSON and cannot be printed.
    return table.encode("utf-8", "backslashreplace").decode()
