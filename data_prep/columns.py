"""What is kept of each record of an annotation file: a few numbers, in columns."""

import math
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.checks import annotation_problems, non_finite
from data_prep.records import Span, short

_LARGEST_ID = 2**63 - 1
NO_ID = -(2**63)  # in a column of ids: the record has none

_NUMBERS = ("start", "end", "id", "image_id", "category_id")
_NO_BOX = (math.nan,) * 4
Row = tuple[tuple[int, ...], tuple[float, ...], bool]  # of _NUMBERS, box, suspect
FIELDS = np.dtype(
    [
        *((name, np.int64) for name in _NUMBERS),
        ("box", np.float64, 4),  # x0, y0, x1, y1; NaN where there is none
        ("suspect", np.bool_),  # something is wrong with it, whatever image and categories are
    ]
)


class ImageRecord(NamedTuple):
    """What conversion needs of an image record; width and height as recorded, None if not.

    `suspect` says that something is wrong with the record by itself.
    """

    id: int
    file_name: str
    width: Any
    height: Any
    suspect: bool
    span: Span


def image_row(record: dict[str, Any], span: Span) -> ImageRecord:
    """What is kept of an image; a `file_name` that is not ASCII has to be read again.

    Raises:
        ValueError: it has no id or no file name.
    """
    number, name = _id(record.get("id")), record.get("file_name")
    if number == NO_ID:
        raise ValueError(f"need an integer id below 2^63, got {short(record)}")
    if not isinstance(name, str):
        raise ValueError(f"need a file_name, got {short(record)}")
    # Read as Latin-1, a name that is not in ASCII is not the real one: None until read again.
    known: Any = name if name.isascii() else None
    suspect = any(map(non_finite, record.values()))
    return ImageRecord(number, known, record.get("width"), record.get("height"), suspect, span)


def annotation_row(record: dict[str, Any], span: Span) -> Row:
    """What is kept of an annotation."""
    start, end = span
    number, image, category = map(record.get, ("id", "image_id", "category_id"))
    numbers = (start, end, _id(number), _id(image), _id(category))
    if next(annotation_problems(record), None) is not None:
        return numbers, _NO_BOX, True
    x, y, width, height = record["bbox"]
    return numbers, (x, y, x + width, y + height), False


def packed(rows: list[Row]) -> NDArray[Any]:
    """Annotations as an array of FIELDS."""
    columns = np.zeros(len(rows), FIELDS)
    # Several times as fast as one array of tuples.
    numbers = np.fromiter(chain.from_iterable(row[0] for row in rows), np.int64)
    for name, column in zip(_NUMBERS, numbers.reshape(-1, len(_NUMBERS)).T, strict=True):
        columns[name] = column
    boxes = np.fromiter(chain.from_iterable(row[1] for row in rows), np.float64)
    columns["box"] = boxes.reshape(-1, 4)
    columns["suspect"] = [row[2] for row in rows]
    return columns


def side(value: Any) -> float:
    """A width or height as a number, NaN if it is none."""
    number = isinstance(value, int | float) and not non_finite(value)
    return float(value) if number else math.nan


def is_id(value: Any) -> bool:
    """Whether a JSON value is an integer that fits into 64 bits."""
    return _id(value) != NO_ID


def _id(value: Any) -> int:
    """For a column of ids."""
    return value if type(value) is int and -_LARGEST_ID <= value <= _LARGEST_ID else NO_ID


def id_or_none(value: np.int64) -> int | None:
    """An id of a column as it was, None if the record had none."""
    return None if value == NO_ID else int(value)
