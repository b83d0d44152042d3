"""Shards -> the annotation file they were made from, equal as JSON up to the order of lists."""

import json
import tempfile
from collections.abc import Iterable, Iterator
from operator import itemgetter
from typing import Any, BinaryIO, NamedTuple

from tqdm import tqdm

from data_prep.manifest import Manifest, read_manifest
from data_prep.shards import read_record, split_record
from data_prep.storage import Folder, Location, file_at, folder_at


class _Place(NamedTuple):
    """Where the records of an image lie in the scratch file: its own, then its annotations."""

    id: int
    start: int
    image: int
    annotations: int


def stored_records(folder: Folder, manifest: Manifest, title: str) -> Iterator[tuple[int, bytes]]:
    """Yield (row of the index, KEY.json) of every sample in shard order; with a progress bar.

    Raises:
        ValueError: a shard is missing or a sample is damaged.
    """
    offsets, lengths, ids = (manifest.samples[name] for name in ("offset", "length", "id"))
    row = 0
    with tqdm(total=manifest.num_images, desc=title, unit="image", disable=None) as bar:
        for shard in manifest.shards:
            path = f"{folder}/{shard['name']}"
            try:
                with folder.local_copy(shard["name"]) as local, local.open("rb") as file:
                    for _ in range(shard["samples"]):
                        yield row, read_record(file.fileno(), offsets[row], lengths[row])
                        row += 1
            except FileNotFoundError:
                raise ValueError(f"{path} is missing; see data_prep verify") from None
            except ValueError as error:
                raise ValueError(
                    f"{path}: image {ids[row]} is damaged: {error}; see data_prep verify"
                ) from None
            bar.update(shard["samples"])


def export(shards: Location, output: Location) -> Manifest:
    """Write the annotation file; images that conversion left out are not in it.

    Images come in the order of their ids, annotations in that of their images, every record as
    the text it was. Shards are read once and in order; the records wait in a scratch file.

    Args:
        shards: folder with a manifest; path or fsspec URL.
        output: file to write; path or fsspec URL.

    Raises:
        ValueError: `output` exists or names no file, or the shards are incomplete or damaged.
    """
    folder = folder_at(shards)
    manifest = read_manifest(shards)
    target, name = file_at(output)
    there = target.names() or ()
    if name in ("", ".", ".."):
        raise ValueError(
            f"--output: got {str(output)!r}, expected the name of a file, such as instances.json"
        )
    if name in there:
        raise ValueError(f"{output} exists already; remove it or choose another --output")
    with (
        target.new_file(name, ".") as path,
        path.open("wb") as file,
        tempfile.TemporaryFile(dir=path.parent) as scratch,
    ):
        places = []
        for row, record in stored_records(folder, manifest, "export"):
            image, annotations = split_record(record)
            joined = b",\n".join(annotations)
            number = manifest.samples["id"][row]
            places.append(_Place(number, scratch.tell(), len(image), len(joined)))
            scratch.write(image + joined)
        places.sort(key=itemgetter(0))
        file.write(b"{")
        for i, key in enumerate(manifest.keys):
            file.write(b", " if i else b"")
            file.write(json.dumps(key).encode() + b": ")
            if key == "images":
                _write_list(file, (_at(scratch, p.start, p.image) for p in places))
            elif key == "annotations":
                orphans = (json.dumps(o).encode() for o in manifest.orphan_annotations)
                _write_list(
                    file,
                    (_at(scratch, p.start + p.image, p.annotations) for p in places),
                    orphans,
                )
            else:
                file.write(json.dumps(manifest.header[key]).encode())
        file.write(b"}\n")
    return manifest


def _at(scratch: BinaryIO, start: int, length: int) -> bytes:
    scratch.seek(start)
    return scratch.read(length)


def _write_list(file: BinaryIO, *parts: Iterable[Any]) -> None:
    file.write(b"[")
    separator = b""
    for part in parts:
        for rows in part:
            if rows:
                file.write(separator + rows)
                separator = b",\n"
    file.write(b"]")
