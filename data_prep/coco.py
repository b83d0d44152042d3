"""Reading COCO annotation files of any size without losing a character of a record.

Images and annotations stay the bytes they came as and are cut out of the mapped file by position,
so unknown fields, number formats and duplicate keys pass through as they are. Memory holds a few
numbers a record, not a tree of Python objects; every record is parsed once, in parallel.
"""

import codecs
import hashlib
import json
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.checks import BOX_TOLERANCE, Problem, header_problems
from data_prep.columns import (
    FIELDS,
    NO_ID,
    ImageRecord,
    annotation_row,
    id_or_none,
    image_row,
    is_id,
    packed,
    side,
)
from data_prep.parallel import OrderedMap
from data_prep.records import Span, Task, each_chunk, short
from data_prep.shards import join_record, record_length
from data_prep.storage import Location

_BLOCK = 2**18  # bytes; fits into the cache


@dataclass(frozen=True)
class CocoFile:
    """An annotation file, indexed.

    `keys` are the top-level keys in their order, `header` the values of all but images and
    annotations. `images` holds the first record of each id; `repeated` further records of an id
    seen before. `problems` are those of the file by itself: ids that are taken or lead nowhere.
    """

    origin: str
    data: Any
    sha256: str
    keys: list[str]
    header: dict[str, Any]
    images: list[ImageRecord]
    repeated: list[ImageRecord]
    orphans: list[Any]
    problems: list[Problem]
    _annotations: NDArray[Any]  # of FIELDS, those of an image together, images in order
    _first: NDArray[np.int64]  # [images + 1] where in it those of an image begin
    _suspects: frozenset[int]  # images with an annotation that something may be wrong with

    def annotation_count(self, image: int) -> int:
        """Annotations of `images[image]`."""
        return int(self._first[image + 1] - self._first[image])

    def is_suspect(self, image: int) -> bool:
        """Whether something may be wrong with the records of `images[image]`."""
        record = self.images[image]
        unknown_size = record.width is None or record.height is None
        return record.suspect or unknown_size or image in self._suspects

    def sample_json(self, image: int) -> bytes:
        """The `KEY.json` of an image: {"image": record, "annotations": [records]}, UTF-8."""
        own = self._annotations[["start", "end"]][self._first[image] : self._first[image + 1]]
        rows = (self.data[start:end] for start, end in own.tolist())
        return join_record(self.data[slice(*self.images[image].span)], rows)

    def sample_lengths(self) -> NDArray[np.int64]:
        """[images] the length of `sample_json` of each, without making it."""
        sums = np.concatenate(
            ([0], np.cumsum(self._annotations["end"] - self._annotations["start"]))
        )
        spans = np.array([image.span for image in self.images]).reshape(-1, 2)
        annotations = np.diff(sums[self._first])
        lengths: NDArray[np.int64] = record_length(
            spans[:, 1] - spans[:, 0], annotations, np.diff(self._first)
        )
        return lengths


def read_coco(path: Path, ordered: OrderedMap = map, origin: Location = "") -> CocoFile:
    """Read and index an annotation file.

    Args:
        path: a local file; it must not change before it is closed.
        ordered: spreads the parsing, see `data_prep.parallel`.
        origin: where the user has the file, for messages; `path` if it is not given.

    Raises:
        ValueError: the file is missing, not JSON, or not in COCO's format.
    """
    origin = str(origin) or str(path)
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            data: Any = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    except OSError as error:
        raise ValueError(f"cannot read annotation file {origin}: {error.strerror}") from None
    digest = hashlib.sha256()
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for start in range(0, len(data), _BLOCK):
            block = data[start : start + _BLOCK]
            digest.update(block)
            decoder.decode(block, final=start + _BLOCK >= len(data))
    except UnicodeDecodeError as error:
        raise ValueError(f"{origin} is not JSON in UTF-8: {_encoding(data[:4], error)}") from None
    reader = _Reader(path, origin, data, ordered)
    try:
        reader.read()
        in_header = list(header_problems(reader.header))
    except json.JSONDecodeError as error:
        where = json.JSONDecodeError(error.msg, data[:].decode("latin-1"), error.pos)
        raise ValueError(f"{origin} is not valid JSON: {where}") from None
    except RecursionError:
        raise ValueError(f"{origin} is not in COCO format: it is nested too deeply") from None
    return reader.finish(digest.hexdigest(), in_header)


def _encoding(beginning: bytes, error: UnicodeDecodeError) -> str:
    """What the file is instead, as far as its first bytes tell."""
    if beginning.startswith(b"\x1f\x8b"):
        return "it is gzipped; unpack it with gunzip"
    if beginning.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "it is in UTF-16; convert it with iconv -f utf-16 -t utf-8"
    return str(error)


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
            and is_id(category.get("id"))
            and isinstance(category.get("name"), str)
        ):
            raise ValueError(
                f"{origin} is not in COCO format: a category needs an integer id and a name, "
                f"got {short(category)}"
            )
        ids.append(category["id"])
    if len(set(ids)) < len(ids):
        twice = next(number for number in ids if ids.count(number) > 1)
        raise ValueError(f"{origin} has two categories with id {twice}; ids must be distinct")
    return ids


class _Reader:
    """One pass over the bytes of an annotation file."""

    def __init__(self, path: Path, origin: str, data: Any, ordered: OrderedMap) -> None:
        self.path = path
        self.origin = origin
        self.data = data
        self.ordered = ordered
        self.header: dict[str, Any] = {}
        self.keys: list[str] = []
        self.images: list[ImageRecord] = []
        self.annotations = np.zeros(0, FIELDS)

    def read(self) -> None:
        mark = len(codecs.BOM_UTF8)
        position = self._skip(mark if self.data[:mark] == codecs.BOM_UTF8 else 0)
        if self.data[position : position + 1] != b"{":
            self._value(position)  # what is no JSON at all is called that
            raise self._not_coco("the top level must be an object with images and annotations")
        position = self._skip(position + 1)
        if self.data[position : position + 1] == b"}":
            position += 1
        else:
            position = self._members(position)
        if self._skip(position) != len(self.data):
            raise json.JSONDecodeError("Extra data", "", position)

    def _members(self, position: int) -> int:
        while True:
            key, position = self._value(position)
            if not isinstance(key, str):
                raise json.JSONDecodeError("Expecting a property name", "", position)
            position = self._expect(b":", position)
            if key in self.keys:
                raise self._not_coco(f"the key {short(key)} is there twice")
            self.keys.append(key)
            if key == "images":
                chunks, position = self._list(key, position, image_row, list, False)
                self.images = [
                    image
                    if image.file_name is not None
                    else image._replace(file_name=self._record(image.span)["file_name"])
                    for image in chain.from_iterable(chunks)
                ]
            elif key == "annotations":
                chunks, position = self._list(key, position, annotation_row, packed, True)
                self.annotations = np.concatenate([self.annotations, *chunks])
            else:
                self.header[key], position = self._value(position)
            position = self._skip(position)
            if self.data[position : position + 1] == b"}":
                return position + 1
            position = self._expect(b",", position)

    def finish(self, digest: str, in_header: list[Problem]) -> CocoFile:
        missing = [
            key
            for key, there in (
                ("images", "images" in self.keys),
                ("categories", self.header.get("categories") is not None),
            )
            if not there
        ]
        if missing:
            raise self._not_coco(f"it has no {' and no '.join(missing)}")
        if not self.images:
            raise ValueError(f"{self.origin} lists no images; there is nothing to convert")
        categories = category_ids(self.header["categories"], self.origin)
        seen: set[int] = set()
        images: list[ImageRecord] = []
        repeated: list[ImageRecord] = []
        for image in self.images:
            (repeated if image.id in seen else images).append(image)
            seen.add(image.id)
        rows = self.annotations
        problems = self._id_problems()

        ids = np.array([image.id for image in images])
        by_id = np.argsort(ids)
        place = np.minimum(np.searchsorted(ids, rows["image_id"], sorter=by_id), len(ids) - 1)
        image_of = by_id[place]
        placed = ids[image_of] == rows["image_id"]
        orphans = [self._record(Span(row["start"], row["end"])) for row in rows[~placed]]
        for orphan in orphans:
            detail = f"image_id {short(orphan.get('image_id'))} matches no image"
            problems.append(Problem("annotation without image", None, orphan.get("id"), detail))

        rows, image_of = rows[placed], image_of[placed]
        order = np.argsort(image_of, kind="stable")
        rows, image_of = rows[order], image_of[order]
        sizes = np.array([[side(image.width), side(image.height)] for image in images])
        with np.errstate(invalid="ignore"):
            inside = (rows["box"][:, :2] >= -BOX_TOLERANCE).all(1)
            inside &= (rows["box"][:, 2:] <= sizes[image_of] + BOX_TOLERANCE).all(1)
        suspect = rows["suspect"] | ~inside | ~np.isin(rows["category_id"], categories)
        return CocoFile(
            origin=self.origin,
            data=self.data,
            sha256=digest,
            keys=self.keys,
            header=self.header,
            images=images,
            repeated=repeated,
            orphans=orphans,
            problems=problems + in_header,
            _annotations=rows,
            _first=np.searchsorted(image_of, np.arange(len(images) + 1)),
            _suspects=frozenset(image_of[suspect].tolist()),
        )

    def _id_problems(self) -> list[Problem]:
        rows = self.annotations
        order = np.argsort(rows["id"], kind="stable")
        again = order[1:][np.diff(rows["id"][order]) == 0]
        wrong = rows["id"] == NO_ID
        problems = []
        for row in rows[np.sort(again)]:
            if row["id"] != NO_ID:
                detail = f"id {row['id']} is used by more than one annotation"
                image = id_or_none(row["image_id"])
                problems.append(Problem("duplicate annotation id", image, int(row["id"]), detail))
        for row in rows[wrong]:
            number = self._record(Span(row["start"], row["end"])).get("id")
            detail = f"its id is {short(number)}, not an integer"
            problems.append(
                Problem("invalid annotation id", id_or_none(row["image_id"]), None, detail)
            )
        return problems

    def _list(
        self,
        key: str,
        position: int,
        read: Callable[[dict[str, Any], Span], Any],
        pack: Callable[[list[Any]], Any],
        skip_lists: bool,
    ) -> tuple[list[Any], int]:
        """What `pack` made of the rows of a list, and the position behind it."""
        position = self._skip(position)
        if self.data[position : position + 1] != b"[":
            raise self._not_coco(f"{key} must be a list")
        position = self._skip(position + 1)
        if self.data[position : position + 1] == b"]":
            return [], position + 1
        chunks: list[Any] = []
        end: int | None = None
        try:
            first = Task(self.path, position, len(self.data), read, pack, skip_lists)
            for found, end in each_chunk(first, self.data, self.ordered):  # noqa: B007
                chunks.append(found)
        except json.JSONDecodeError:
            raise
        except ValueError as error:
            raise self._not_coco(f"{key} {str(error).partition(';')[0]}") from None
        assert end is not None
        return chunks, end

    def _record(self, span: Span) -> dict[str, Any]:
        record = json.loads(self.data[span.start : span.end])
        assert isinstance(record, dict)
        return record

    def _value(self, position: int) -> tuple[Any, int]:
        """A value that may be of any size, from ever larger windows on the file."""
        position, window = self._skip(position), 2**16
        while True:
            stop = min(position + window, len(self.data))
            text = self.data[position:stop].decode("latin-1")
            try:
                _, length = json.JSONDecoder().raw_decode(text)
                # A number at the edge may go on.
                if length < len(text) or stop == len(self.data):
                    end = position + length
                    return json.loads(self.data[position:end]), end
            except json.JSONDecodeError as error:
                if stop == len(self.data):
                    raise json.JSONDecodeError(error.msg, "", position + error.pos) from None
            except ValueError as error:  # a number of thousands of digits
                raise self._not_coco(str(error).partition(";")[0]) from None
            window *= 8

    def _skip(self, position: int) -> int:
        while True:
            block = self.data[position : position + 1024]
            skipped = len(block) - len(block.lstrip(b" \t\n\r"))
            position += skipped
            if not block or skipped < len(block):
                return position

    def _expect(self, character: bytes, position: int) -> int:
        position = self._skip(position)
        if self.data[position : position + 1] != character:
            raise json.JSONDecodeError(f"Expecting '{character.decode()}'", "", position)
        return position + 1

    def _not_coco(self, why: str) -> ValueError:
        return ValueError(f"{self.origin} is not in COCO format: {why}")
