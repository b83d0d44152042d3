"""Writing one shard, as one task of a conversion: in any process, on any machine."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.checks import (
    Problem,
    TruncatedImage,
    UnsupportedImage,
    annotation_problems,
    decode_image,
    read_image_header,
    record_problems,
    size_mismatch,
)
from data_prep.shards import BLOCK, END, member_header, sample_key
from data_prep.storage import Folder, LocalFolder

STATE = ".convert"  # in an unfinished output: what is converted, and one result a finished shard


class Item(NamedTuple):
    """A sample to be written: `record` is its KEY.json, `size` the bytes of the image file.

    `suspect` says that the annotations have to be looked at; of the others nothing is wrong.
    """

    id: int
    file_name: str
    size: int
    width: Any
    height: Any
    record: bytes
    annotations: int
    suspect: bool


@dataclass(frozen=True)
class Task:
    """A shard to be written; `name` has no extension. With `decode` every image is decoded."""

    name: str
    output: Folder
    images: Folder
    categories: frozenset[int]
    items: list[Item]
    decode: bool


@dataclass(frozen=True)
class WrittenShard:
    """A written shard; `columns` as in the manifest, without shard."""

    name: str
    bytes: int
    sha256: str
    columns: dict[str, list[int]]
    problems: list[Problem]


def write_shard(task: Task) -> WrittenShard:
    """Write `task.name`.tar and then its result file; do nothing if both are there.

    Nothing is forced to the disk, as `tar` and `cp` do not either. So after a power cut a shard
    may be there without its content, and one that is there is hashed before it is relied on.

    Raises:
        OSError: writing fails, or a remote store does.
    """
    result = f"{STATE}/{task.name}.json"
    finished = _finished(task.output, f"{task.name}.tar", result)
    if finished is not None:
        return finished
    with task.output.new_file(f"{task.name}.tar", STATE) as path:
        shard = _write_tar(task, path)
    task.output.write(result, json.dumps(vars(shard)).encode())
    return shard


def _finished(output: Folder, name: str, result: str) -> WrittenShard | None:
    if output.sizes([result]) == [None]:
        return None
    try:
        content = json.loads(output.read(result))
    except (FileNotFoundError, ValueError):
        return None
    if output.sizes([name]) != [content["bytes"]]:
        return None
    if isinstance(output, LocalFolder):
        with (output.path / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != content["sha256"]:
                return None
    content["problems"] = [Problem(*row) for row in content["problems"]]
    return WrittenShard(**content)


def _write_tar(task: Task, path: Path) -> WrittenShard:
    columns: dict[str, list[int]] = {
        name: [] for name in ("offset", "length", "width", "height", "id", "annotations")
    }
    problems: list[Problem] = []
    digest = hashlib.sha256()
    offset = 0

    def append(*parts: bytes) -> int:
        length = sum(map(len, parts))
        # A call of the system can write less than it was given, up to 2 GiB.
        if os.writev(file.fileno(), parts) < length:
            file.seek(offset)
            for part in parts:
                _write_all(file, part)
        for part in parts:
            digest.update(part)
        return length

    with path.open("wb", buffering=0) as file:
        for item in task.items:
            data, extension, size, found = _read_image(task, item)
            problems += found
            if data is None:
                continue
            if item.suspect:
                problems += _annotation_problems(item, size, task.categories)
            key = sample_key(item.id)
            length = append(
                member_header(f"{key}.{extension}", len(data)),
                data,
                bytes(-len(data) % BLOCK),
                member_header(f"{key}.json", len(item.record)),
                item.record,
                bytes(-len(item.record) % BLOCK),
            )
            row = (offset, length, *size, item.id, item.annotations)
            for column, value in zip(columns.values(), row, strict=True):
                column.append(value)
            offset += length
        offset += append(END)
    return WrittenShard(f"{task.name}.tar", offset, digest.hexdigest(), columns, problems)


def _write_all(file: Any, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _read_image(task: Task, item: Item) -> tuple[bytes | None, str, tuple[int, int], list[Problem]]:
    """(content, extension, (width, height), problems); without content if it is left out."""

    def left_out(kind: str, why: str) -> tuple[None, str, tuple[int, int], list[Problem]]:
        return None, "", (0, 0), [Problem(kind, item.id, None, why)]

    try:
        data = task.images.read(item.file_name, item.size)
    except FileNotFoundError:
        return left_out("missing image", f"{item.file_name!r} vanished meanwhile")
    except ConnectionError:
        raise  # the store's trouble says nothing about the image
    except OSError as error:
        return left_out("corrupt image", f"{item.file_name!r}: {error.strerror}")
    try:
        header = read_image_header(data)
        if task.decode:
            decode_image(data)
    except TruncatedImage as error:
        return left_out("truncated image", f"{item.file_name!r}: {error}")
    except UnsupportedImage as error:
        return left_out("unsupported image", f"{item.file_name!r}: {error}")
    except ValueError as error:
        return left_out("corrupt image", f"{item.file_name!r}: {error}")
    size = (header.width, header.height)
    mismatch = size_mismatch((item.width, item.height), size, item.file_name)
    if mismatch:
        return left_out("size mismatch", mismatch)
    return data, header.extension, size, []


def _annotation_problems(
    item: Item, size: tuple[int, int], categories: frozenset[int]
) -> list[Problem]:
    content = json.loads(item.record)
    image = record_problems(content["image"])
    problems = [Problem(kind, item.id, None, why) for kind, why in image]
    for annotation in content["annotations"]:
        for kind, why in annotation_problems(annotation, size, categories):
            problems.append(Problem(kind, item.id, annotation.get("id"), why))
    return problems
