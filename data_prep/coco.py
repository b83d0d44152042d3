"""Reading COCO annotation files of any size without losing a character of a record.

Images and annotations stay the text they came as and are cut out by position, so unknown fields,
number formats and duplicate keys pass through as they are. Beside the text itself, memory holds
a few numbers a record, not a tree of Python objects.
"""

import hashlib
import json
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.checks import Problem

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")
_LARGEST_ID = 2**63 - 1
_HEAD, _MIDDLE, _TAIL = '{"image": ', ', "annotations": [', "]}"


class Span(NamedTuple):
    """Where in the text a record is."""

    start: int
    end: int


class ImageRecord(NamedTuple):
    """What conversion needs of an image record; width and height only where it has them."""

    id: int
    file_name: str
    width: float | None
    height: float | None
    span: Span


@dataclass
class CocoFile:
    """An annotation file, indexed.

    `header` is every top-level key but images and annotations. `images` holds the first record
    of each id; `repeated` further records of an id seen before. `annotations` maps an image id
    to the spans of its annotations; `orphans` are those whose image_id matches no image.
    """

    path: Path
    text: str
    sha256: str
    header: dict[str, Any]
    images: list[ImageRecord]
    repeated: list[ImageRecord]
    annotations: dict[int, list[Span]]
    orphans: list[Any] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def sample_json(self, image: ImageRecord) -> bytes:
        """The `KEY.json` of an image: {"image": record, "annotations": [records]}, UTF-8."""
        own = self.annotations.get(image.id, ())
        rows = ", ".join(self.text[start:end] for start, end in own)
        return f"{_HEAD}{self.text[slice(*image.span)]}{_MIDDLE}{rows}{_TAIL}".encode()

    def sample_characters(self, image: ImageRecord) -> int:
        """Length of `sample_json` in characters (bytes, where all is ASCII), without making it."""
        spans = [image.span, *self.annotations.get(image.id, ())]
        separators = 2 * max(0, len(spans) - 2)
        text = sum(end - start for start, end in spans)
        return len(_HEAD) + len(_MIDDLE) + len(_TAIL) + separators + text


def read_coco(path: Path) -> CocoFile:
    """Read and index an annotation file.

    Raises:
        ValueError: the file is missing, not JSON, or not in COCO's format.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read annotation file {path}: {error.strerror}") from None
    digest = hashlib.sha256(raw).hexdigest()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not JSON in UTF-8: {error}") from None
    del raw
    try:
        reader = _Reader(path, text)
        reader.read()
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{path} is not in COCO format: it is nested too deeply") from None
    return reader.finish(digest)


def category_ids(categories: Any, origin: str) -> list[int]:
    """The ids of a COCO category list.

    Raises:
        ValueError: it is not a list of {"id": int, "name": str} with distinct ids.
    """
    if not isinstance(categories, list) or not categories:
        raise ValueError(f"{origin} is not in COCO format: categories must be a non-empty list")
    ids = []
    for category in categories:
        if not (
            isinstance(category, dict)
            and _is_id(category.get("id"))
            and isinstance(category.get("name"), str)
        ):
            raise ValueError(
                f"{origin} is not in COCO format: a category needs an integer id and a name, "
                f"got {_short(category)}"
            )
        ids.append(category["id"])
    if len(set(ids)) < len(ids):
        twice = next(number for number in ids if ids.count(number) > 1)
        raise ValueError(f"{origin} has two categories with id {twice}; ids must be distinct")
    return ids


class _Reader:
    """One pass over the text of an annotation file."""

    def __init__(self, path: Path, text: str) -> None:
        self.path = path
        self.text = text
        self.header: dict[str, Any] = {}
        self.images: list[ImageRecord] | None = None
        self.repeated: list[ImageRecord] = []
        self.by_image: dict[int, list[Span]] | None = None
        self.unplaced: list[Span] = []
        self.problems: list[Problem] = []

    def read(self) -> None:
        position = self._skip(0)
        if self.text[position : position + 1] != "{":
            self._value(position)  # what is no JSON at all is called that
            raise self._not_coco("the top level must be an object with images and annotations")
        position = self._skip(position + 1)
        if self.text[position : position + 1] == "}":
            position += 1
        else:
            position = self._members(position)
        if self._skip(position) != len(self.text):
            raise json.JSONDecodeError("Extra data", self.text, position)

    def _members(self, position: int) -> int:
        while True:
            key, position = self._value(position)
            if not isinstance(key, str):
                raise json.JSONDecodeError("Expecting a property name", self.text, position)
            position = self._expect(":", position)
            if key == "images":
                position = self._images(position)
            elif key == "annotations":
                position = self._annotations(position)
            else:
                if key in self.header:
                    raise self._not_coco(f"the key {_short(key)} is there twice")
                self.header[key], position = self._value(position)
            position = self._skip(position)
            if self.text[position : position + 1] == "}":
                return position + 1
            position = self._expect(",", position)

    def finish(self, digest: str) -> CocoFile:
        categories = self.header.get("categories")
        missing = [
            key
            for key, value in (
                ("images", self.images),
                ("annotations", self.by_image),
                ("categories", categories),
            )
            if value is None
        ]
        if missing:
            remedy = (
                ' (for images without labels add "annotations": [])'
                if missing == ["annotations"]
                else ""
            )
            raise self._not_coco(f"it has no {' and no '.join(missing)}{remedy}")
        assert self.images is not None
        assert self.by_image is not None
        if not self.images:
            raise ValueError(f"{self.path} lists no images; there is nothing to convert")
        category_ids(categories, str(self.path))
        known = {image.id for image in self.images}
        for number in [number for number in self.by_image if number not in known]:
            self.unplaced += self.by_image.pop(number)
        orphans = [json.loads(self.text[start:end]) for start, end in sorted(self.unplaced)]
        for orphan in orphans:
            detail = f"image_id {_short(orphan.get('image_id'))} matches no image"
            self.problems.append(
                Problem("annotation without image", None, orphan.get("id"), detail)
            )
        return CocoFile(
            path=self.path,
            text=self.text,
            sha256=digest,
            header=self.header,
            images=self.images,
            repeated=self.repeated,
            annotations=self.by_image,
            orphans=orphans,
            problems=self.problems,
        )

    def _images(self, position: int) -> int:
        if self.images is not None:
            raise self._not_coco("the key images is there twice")
        self.images = []
        seen: set[int] = set()
        for record, span in self._elements("images", position):
            if not _is_id(record.get("id")):
                raise self._not_coco(
                    f"an image needs an integer id below 2^63, got {_short(record)}"
                )
            if not isinstance(record.get("file_name"), str):
                raise self._not_coco(f"an image needs a file_name, got {_short(record)}")
            width, height = (self._side(record, name) for name in ("width", "height"))
            image = ImageRecord(record["id"], record["file_name"], width, height, span)
            (self.repeated if image.id in seen else self.images).append(image)
            seen.add(image.id)
        return self._end

    def _side(self, record: dict[str, Any], name: str) -> float | None:
        value = record.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**31:
            raise self._not_coco(
                f"image {record['id']} has {name} {_short(value)}, expected a positive number"
            )
        return value

    def _annotations(self, position: int) -> int:
        if self.by_image is not None:
            raise self._not_coco("the key annotations is there twice")
        self.by_image = defaultdict(list)
        seen: set[int] = set()
        for record, span in self._elements("annotations", position):
            number, image = record.get("id"), record.get("image_id")
            if not _is_id(number):
                detail = f"its id is {_short(number)}, not an integer"
                self.problems.append(
                    Problem("invalid annotation id", _or_none(image), None, detail)
                )
            elif number in seen:
                detail = f"id {number} is used by more than one annotation"
                self.problems.append(
                    Problem("duplicate annotation id", _or_none(image), number, detail)
                )
            else:
                seen.add(number)
            if _is_id(image):
                self.by_image[image].append(span)
            else:
                self.unplaced.append(span)
        return self._end

    def _elements(self, key: str, position: int) -> Any:
        """Yield (object, span) of each element of a list; `_end` is the position after it."""
        position = self._skip(position)
        if self.text[position : position + 1] != "[":
            raise self._not_coco(f"{key} must be a list")
        position = self._skip(position + 1)
        if self.text[position : position + 1] == "]":
            self._end = position + 1
            return
        while True:
            start = self._skip(position)
            record, position = self._value(start)
            if not isinstance(record, dict):
                raise self._not_coco(f"{key} must hold objects, got {_short(record)}")
            yield record, Span(start, position)
            position = self._skip(position)
            if self.text[position : position + 1] == "]":
                self._end = position + 1
                return
            position = self._expect(",", position)

    def _value(self, position: int) -> tuple[Any, int]:
        position = self._skip(position)
        try:
            return _DECODER.raw_decode(self.text, position)
        except json.JSONDecodeError:
            raise
        except ValueError as error:  # a number of thousands of digits
            raise self._not_coco(str(error).partition(";")[0]) from None

    def _skip(self, position: int) -> int:
        match = _SPACE.match(self.text, position)
        assert match is not None
        return match.end()

    def _expect(self, character: str, position: int) -> int:
        position = self._skip(position)
        if self.text[position : position + 1] != character:
            raise json.JSONDecodeError(f"Expecting '{character}'", self.text, position)
        return position + 1

    def _not_coco(self, why: str) -> ValueError:
        return ValueError(f"{self.path} is not in COCO format: {why}")


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST_ID


def _or_none(value: Any) -> int | None:
    return value if _is_id(value) else None


def _short(value: Any) -> str:
    """A value as JSON on one line, cut to fit a message."""
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "..."
