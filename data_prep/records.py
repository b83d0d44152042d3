"""Finding the records of a JSON list in a large file, in parallel, without building its tree.

A list is cut into chunks at places that look like the space between two objects. A place may be
wrong (inside a string, or in an inner list), so chunks are parsed on speculation and put together
in order: a chunk counts only if the chain of values before it ends exactly where it begins.
Otherwise the chain goes on alone from where it got stuck. So the result is that of one pass.

Bytes are parsed as Latin-1: JSON's structure is ASCII, and positions in text and file are the
same. What needs the real characters decodes its own bytes again.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from data_prep.parallel import OrderedMap

CHUNK = 2 * 2**20  # bytes
_GAP = re.compile(rb"\}[ \t\n\r]*,[ \t\n\r]*\{")
_BLANK = re.compile(r"[ \t\n\r]*")
_NEXT = (",", "]")
_DECODER = json.JSONDecoder()
# A list of at least five plain numbers, as JSON writes them, and none of them infinite.
_NUMBER = r"-?+(?:0|[1-9][0-9]{0,17}+)(?:\.[0-9]{1,18}+)?+"
_LONG_LIST = re.compile(rf"\[(?:{_NUMBER}, ?+){{4,}}+{_NUMBER}\]")

Row = TypeVar("Row")
Found = TypeVar("Found")


class Span(NamedTuple):
    """Bytes of the file that a record is in."""

    start: int
    end: int


@dataclass(frozen=True)
class Task(Generic[Row, Found]):
    """Bytes `start` to `end` of a file, and what to make of the records in them.

    `read` makes a row of a record and raises ValueError if it is no record of this list; `pack`
    makes something small to send of the rows. Both must be picklable. With `skip_lists`, long
    lists of numbers (polygons, keypoints) are only checked to be that, and `read` sees empty
    ones, in strings too: most of an annotation file is coordinates.
    """

    path: Path
    start: int
    end: int
    read: Callable[[dict[str, Any], Span], Row]
    pack: Callable[[list[Row]], Found]
    skip_lists: bool = False


@dataclass(frozen=True)
class Chunk(Generic[Found]):
    """The records from the beginning of a task on.

    The list goes on at `next`; if that is None it ended, and `end` is behind its bracket.
    `error` says why the record at `next` could not be read from the bytes at hand.
    """

    found: Found
    next: int | None
    end: int
    error: Exception | None


def each_chunk(
    first: Task[Row, Found], data: Any, ordered: OrderedMap
) -> Iterator[tuple[Found, int | None]]:
    """Yield (packed rows, end of the list if it is the last) of consecutive runs of records.

    Args:
        first: begins at the first record of a list that is not empty, and ends with the file.
        data: the bytes of the file, mapped.
        ordered: runs the tasks.

    Raises:
        json.JSONDecodeError: not JSON; its `pos` is the byte.
        ValueError: a value in it cannot be read, or `read` refused a record.
        RecursionError: nested too deeply.
    """
    if first.end - first.start <= CHUNK:
        ordered = map  # not worth a process
    position, enough = first.start, 0
    for chunk, task in ordered(_index_with_task, _chunks(first, data)):
        if task.start != position:
            # Bytes before or behind the place where the chain is: go on from there instead.
            if task.end < min(enough, first.end):
                continue
            chunk = index_chunk(replace(task, start=position))
        if chunk.next is None:
            yield chunk.found, chunk.end
            return
        yield chunk.found, None
        position = chunk.next
        if chunk.error is not None:
            # The record goes on behind these bytes, or is wrong: twice as many will tell.
            if task.end == first.end:
                raise chunk.error
            enough = position + 2 * (task.end - position)
    raise json.JSONDecodeError("Expecting value", "", position)


def _chunks(first: Task[Row, Found], data: Any) -> Iterator[Task[Row, Found]]:
    start = first.start
    while start < first.end:
        gap = _GAP.search(data, start + CHUNK)
        end = gap.end() - 1 if gap else first.end
        yield replace(first, start=start, end=end)
        start = end


def _index_with_task(task: Task[Row, Found]) -> tuple[Chunk[Found], Task[Row, Found]]:
    return index_chunk(task), task


def index_chunk(task: Task[Row, Found]) -> Chunk[Found]:
    """Read the records that begin at `task.start`, as far as the bytes go."""
    with task.path.open("rb") as file:
        text = os.pread(file.fileno(), task.end - task.start, task.start).decode("latin-1")
    if task.skip_lists:
        text = _LONG_LIST.sub(_emptied, text)
    rows: list[Row] = []
    position = 0
    error: Exception | None = None
    while position < len(text):
        try:
            record, end = _DECODER.raw_decode(text, position)
            if not isinstance(record, dict):
                raise ValueError(f"must hold objects, got {short(record)}")
            after = end if text[end : end + 1] in _NEXT else blank(text, end)
            if text[after : after + 1] not in _NEXT:
                raise json.JSONDecodeError("Expecting ',' delimiter", "", after)
            rows.append(task.read(record, Span(task.start + position, task.start + end)))
        except json.JSONDecodeError as found:
            error = json.JSONDecodeError(found.msg, "", task.start + found.pos)
            break
        except (ValueError, RecursionError) as found:
            error = found
            break
        if text[after] == "]":
            return Chunk(task.pack(rows), None, task.start + after + 1, None)
        position = blank(text, after + 1)
    return Chunk(task.pack(rows), task.start + position, task.end, error)


def _emptied(match: re.Match[str]) -> str:
    """An empty list of the same length, so that positions stay."""
    return f"[{' ' * (match.end() - match.start() - 2)}]"


def blank(text: str, position: int) -> int:
    """The next position that is not JSON's white space."""
    match = _BLANK.match(text, position)
    assert match is not None
    return match.end()


def short(value: Any) -> str:
    """A value as JSON on one line, cut to fit a message."""
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "..."
