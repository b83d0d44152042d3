"""One sample in a tar shard: two members, KEY.<image extension> and KEY.json, side by side.

Members carry no time, owner or mode of the machine, so equal data gives equal bytes.
"""

import io
import json
import tarfile
from collections.abc import Iterator
from typing import Any, NamedTuple

BLOCK = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK)  # two empty blocks end a tar


class Sample(NamedTuple):
    """A sample read back: `image` as encoded, `record` the parsed KEY.json."""

    key: str
    extension: str
    image: bytes
    record: dict[str, Any]


def sample_key(image_id: int) -> str:
    """The WebDataset key of an image: its id in at least 12 digits."""
    return f"{image_id:012d}"


def member_length(size: int) -> int:
    """Bytes that a file of `size` bytes takes in a tar: header block and whole data blocks."""
    return BLOCK + -(-size // BLOCK) * BLOCK


def encode_member(name: str, data: bytes) -> bytes:
    """A tar member, header and padded data."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mode = 0o644
    header = info.tobuf(tarfile.USTAR_FORMAT)
    assert len(header) == BLOCK, name
    return header + data + bytes(-len(data) % BLOCK)


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
        raise ValueError(f"{image_name} is followed by {json_name}, expected {key}.json")
    try:
        record = json.loads(encoded)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{json_name} is not JSON: {error}") from None
    if not (
        isinstance(record, dict)
        and isinstance(record.get("image"), dict)
        and isinstance(record.get("annotations"), list)
        and all(isinstance(annotation, dict) for annotation in record["annotations"])
    ):
        raise ValueError(f"{json_name} does not hold an image and its annotations")
    return Sample(key, extension, image, record)


def _members(data: bytes) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for info in tar:
                content = tar.extractfile(info)
                if content is None:
                    raise ValueError(f"{info.name} is not a plain file")
                yield info.name, content.read()
    except tarfile.TarError as error:
        raise ValueError(f"not a tar: {error}") from None
