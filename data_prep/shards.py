"""One sample in a tar shard: two members, KEY.<image extension> and KEY.json, side by side.

Members carry no time, owner or mode of the machine, so equal data gives equal bytes.
"""

import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

BLOCK = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK)  # two empty blocks end a tar
_HEAD, _MIDDLE, _BETWEEN, _TAIL = b'{"image": ', b', "annotations": [', b", ", b"]}"
_DECODER = json.JSONDecoder()
# The constant parts of a header: mode 644, owner 0 and group 0; time 0; plain file, no names.
_BEFORE_SIZE = b"0000644\0" + b"0000000\0" * 2
_BEFORE_CHECKSUM = b"\0" + b"00000000000\0"
_REST = (b"\0 0" + bytes(100) + b"ustar\00000" + bytes(64) + b"0000000\0" * 2).ljust(358, b"\0")
# Of all bytes, with spaces in place of the checksum: six digits, a NUL and a space.
_REST_SUM = sum(_BEFORE_SIZE) + sum(_BEFORE_CHECKSUM) + sum(_REST[2:]) + 8 * ord(" ")
Lengths = NDArray[np.int64]
Size = TypeVar("Size", int, Lengths)


class Sample(NamedTuple):
    """A sample read back: `image` as encoded, `record` the parsed KEY.json."""

    key: str
    extension: str
    image: bytes
    record: dict[str, Any]


def sample_key(image_id: int) -> str:
    """The WebDataset key of an image: its id in at least 12 digits."""
    return f"{image_id:012d}"


def member_length(size: Size) -> Size:
    """Bytes that a file of `size` bytes takes in a tar: header block and whole data blocks."""
    return BLOCK + -(-size // BLOCK) * BLOCK


def member_header(name: str, size: int) -> bytes:
    """The block before the data of a tar member: POSIX ustar, what `tarfile` would write.

    Raises:
        ValueError: 8 GiB or more, which this format has no digits for.
    """
    encoded = name.encode("ascii")
    assert len(encoded) <= 100, name
    if size >= 8**11:
        raise ValueError(f"{name} has {size} bytes, a tar member must have less than {8**11}")
    total = _REST_SUM + sum(encoded) + sum(b"%011o" % size)
    return b"%s%s%011o%s%06o%s" % (
        encoded.ljust(100, b"\0"),
        _BEFORE_SIZE,
        size,
        _BEFORE_CHECKSUM,
        total,
        _REST,
    )


def encode_member(name: str, data: bytes) -> bytes:
    """A tar member, header and padded data."""
    return member_header(name, len(data)) + data + bytes(-len(data) % BLOCK)


def read_sample(data: bytes) -> Sample:
    """Read a sample from its bytes in the shard, as the manifest's offset and length give them.

    Raises:
        ValueError: the bytes are not exactly an image member and its JSON member.
    """
    members = list(_members(data))
    if len(members) != 2:
        raise ValueError(f"expected an image and its JSON, got {len(members)} tar members")
    (image_name, image), (json_name, encoded) = members
    key, _, extension = image_name.partition(".")
    if json_name != f"{key}.json" or not extension:
        raise ValueError(f"{image_name!r} is followed by {json_name!r}, expected {key + '.json'!r}")
    try:
        record = json.loads(encoded)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{json_name!r} is not JSON: {error}") from None
    if not (
        isinstance(record, dict)
        and isinstance(record.get("image"), dict)
        and isinstance(record.get("annotations"), list)
        and all(isinstance(annotation, dict) for annotation in record["annotations"])
    ):
        raise ValueError(f"{json_name!r} does not hold an image and its annotations")
    return Sample(key, extension, image, record)


def read_record(descriptor: int, offset: int, length: int) -> bytes:
    """The KEY.json of a sample in an open shard, as it is, without reading the image.

    Raises:
        ValueError: there is no image member followed by a JSON member that ends at `length`.
    """
    start, end = offset, offset + length
    name, size = _read_header(descriptor, start)
    start += member_length(size)
    json_name, size = _read_header(descriptor, start)
    if json_name != f"{name.partition('.')[0]}.json" or start + member_length(size) != end:
        raise ValueError(f"{name!r} is followed by {json_name!r} of {size} bytes")
    return os.pread(descriptor, size, start + BLOCK)


def _read_header(descriptor: int, offset: int) -> tuple[str, int]:
    try:
        block = os.pread(descriptor, BLOCK, offset)
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.TarError as error:
        raise ValueError(f"not a tar: {error}") from None
    return info.name, info.size


def split_record(record: bytes) -> tuple[bytes, list[bytes]]:
    """A KEY.json as the text of the image record and of each annotation.

    Raises:
        ValueError: it is not as `join_record` makes it.
    """
    # Latin-1: positions in the text are those in the bytes, and JSON's structure is ASCII.
    text = record.decode("latin-1")
    start = len(_HEAD)
    image, end = _DECODER.raw_decode(text, start)
    if not record.startswith(_HEAD) or not isinstance(image, dict):
        raise ValueError("it does not hold an image and its annotations")
    rows: list[bytes] = []
    separator = _MIDDLE
    position, last = end, len(record) - len(_TAIL)
    while position < last and record.startswith(separator, position):
        position += len(separator)
        if position == last and not rows:
            break
        row, stop = _DECODER.raw_decode(text, position)
        if not isinstance(row, dict):
            raise ValueError("an annotation is not an object")
        rows.append(record[position:stop])
        position, separator = stop, _BETWEEN
    if position != last or not record.endswith(_TAIL):
        raise ValueError("it does not hold an image and its annotations")
    return record[start:end], rows


def join_record(image: bytes, annotations: Iterable[bytes]) -> bytes:
    """The KEY.json of a sample: {"image": record, "annotations": [records]}."""
    return b"".join((_HEAD, image, _MIDDLE, _BETWEEN.join(annotations), _TAIL))


def record_length(image: Lengths, annotations: Lengths, count: Lengths) -> Lengths:
    """Length of a KEY.json of records of these lengths, the annotations' in total."""
    fixed = len(_HEAD) + len(_MIDDLE) + len(_TAIL)
    return fixed + image + annotations + len(_BETWEEN) * np.maximum(0, count - 1)


def _members(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Headers are read one by one: `tarfile.open` would also follow links, sparse maps and extended
    headers, which no shard has and a damaged one may seem to have."""
    position = 0
    while position < len(data):
        block = data[position : position + BLOCK]
        if not block.strip(b"\0"):  # what follows is padding
            return
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.TarError as error:
            raise ValueError(f"not a tar: {error}") from None
        start = position + BLOCK
        if not info.isreg():
            raise ValueError(f"{info.name[:60]!r} is not a plain file")
        if not 0 <= info.size <= len(data) - start:
            raise ValueError(f"{info.name[:60]!r} of {info.size} bytes does not end in it")
        yield info.name, data[start : start + info.size]
        position = start + -(-info.size // BLOCK) * BLOCK
