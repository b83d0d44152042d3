"""Writing one shard, as one task of a conversion: in any process, on any machine."""

import errno
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
from data_prep.machine_errors import REMEDIES
from data_prep.shards import BLOCK, END, member_header, sample_key
from data_prep.storage import Facts, Folder, LocalFolder

STATE = ".convert"  # in an unfinished output: what is converted, and one result a finished shard
# What opening or reading says of the image file itself, and will say again. All else (a stale
# handle, no descriptors or memory left, a failing disk) is the machine's trouble and may pass.
OF_THE_FILE = frozenset((errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG))


class Item(NamedTuple):
    """A sample to be written: `record` is its KEY.json, `facts` those of the image file.

    `suspect` says that the annotations have to be looked at; of the others nothing is wrong.
    """

    id: int
    file_name: str
    facts: Facts
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

    A shard is not forced to the disk, as `tar` and `cp` do not either. So after a power cut it may
    be there without its content, and one that is there is hashed before it is relied on. In a
    store its size is enough: an upload is whole or absent, and was compared when it was made.

    Raises:
        OSError: writing fails, or reading does for a reason that is none of the image's, or a
            remote store does.
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
        problems = [Problem(*row) for row in content.pop("problems")]
        shard = WrittenShard(**content, problems=problems)
    except (FileNotFoundError, ValueError, TypeError, LookupError, AttributeError):
        return None  # a damaged one is as good as none
    if output.sizes([name]) != [shard.bytes]:
        return None
    if isinstance(output, LocalFolder):
        with (output.path / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                return None
    return shard


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
        data = task.images.read(item.file_name, item.facts)
    except ConnectionError:
        raise  # it names the file and the tries
    except OSError as error:
        if error.errno not in OF_THE_FILE:
            raise _not_of_the_file(task, item, error) from None
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


def _not_of_the_file(task: Task, item: Item, error: OSError) -> OSError:
    """An error that stops the conversion, as a line."""
    where = f"{task.images}/{item.file_name}"
    if isinstance(error, FileNotFoundError):
        return OSError(
            f"{where} vanished after the images were listed: put it back and run the same command "
            f"again, which goes on where it stopped; or remove {task.output} and convert without it"
        )
    remedy = REMEDIES.get(error.errno or 0)
    return OSError(
        f"cannot read {where}: {error.strerror or error}{f'; {remedy}' if remedy else ''}; no "
        "image is left out for this, and the same command goes on where it stopped"
    )


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
