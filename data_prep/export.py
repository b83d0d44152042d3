"""Shards -> the annotation file they were made from, equal as JSON up to the order of lists."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from data_prep.manifest import Manifest, read_manifest
from data_prep.shards import Sample, read_sample


def stored_samples(folder: Path, manifest: Manifest, title: str) -> Iterator[Sample]:
    """Read every sample, in the order of image ids, by its byte range; with a progress bar.

    Raises:
        ValueError: a shard is missing or a sample is damaged.
    """
    columns = manifest.samples
    files: dict[int, int] = {}
    try:
        for i in tqdm(
            sorted(range(manifest.num_images), key=columns["id"].__getitem__),
            desc=title,
            unit="image",
            disable=None,
        ):
            shard, offset, length = (columns[name][i] for name in ("shard", "offset", "length"))
            path = folder / manifest.shards[shard]["name"]
            try:
                if shard not in files:
                    files[shard] = os.open(path, os.O_RDONLY)
                yield read_sample(os.pread(files[shard], length, offset))
            except FileNotFoundError:
                raise ValueError(f"{path} is missing; see data_prep verify") from None
            except ValueError as error:
                raise ValueError(
                    f"{path}: image {columns['id'][i]} is damaged: {error}; see data_prep verify"
                ) from None
    finally:
        for descriptor in files.values():
            os.close(descriptor)


def export(shards: Path, output: Path) -> Manifest:
    """Write the annotation file; images that conversion left out are not in it.

    Images come in the order of their ids, annotations in that of their images. Memory holds one
    sample at a time, so the shards are read twice.

    Raises:
        ValueError: `output` exists, or the shards are incomplete or damaged.
    """
    manifest = read_manifest(shards)
    if output.exists():
        raise ValueError(f"{output} exists already; remove it or choose another --output")
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(output.name + ".tmp")
    with temporary.open("w") as file:
        file.write("{")
        for key, value in manifest.header.items():
            file.write(f"{json.dumps(key)}: {json.dumps(value)}, ")
        samples = stored_samples(shards, manifest, "images")
        _write_list(file, "images", (sample.record["image"] for sample in samples))
        file.write(", ")
        samples = stored_samples(shards, manifest, "annotations")
        placed = (row for sample in samples for row in sample.record["annotations"])
        _write_list(file, "annotations", placed, manifest.orphan_annotations)
        file.write("}\n")
    os.replace(temporary, output)
    return manifest


def _write_list(file: TextIO, key: str, *parts: Iterable[Any]) -> None:
    file.write(f'"{key}": [')
    separator = ""
    for part in parts:
        for row in part:
            file.write(separator + json.dumps(row))
            separator = ",\n"
    file.write("]")
