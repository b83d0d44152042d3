"""Are these shards what their manifest says, and fit to train on?"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tqdm import tqdm

from data_prep.checks import (
    Problem,
    TruncatedImage,
    UnsupportedImage,
    annotation_problems,
    decode_image,
    header_problems,
    read_image_header,
    record_problems,
    size_mismatch,
)
from data_prep.coco import category_ids
from data_prep.manifest import read_manifest
from data_prep.parallel import ordered_map
from data_prep.shards import read_sample, sample_key
from data_prep.storage import Folder, Location, folder_at

# What makes shards unfit. Other findings were in the data when it was converted.
DAMAGE = frozenset(
    (
        "damaged shard",
        "damaged sample",
        "corrupt image",
        "truncated image",
        "unsupported image",
        "size mismatch",
    )
)


class _Row(NamedTuple):
    """A sample in the index: COLUMNS of the manifest, without shard."""

    offset: int
    length: int
    width: int
    height: int
    id: int
    annotations: int


@dataclass(frozen=True)
class _Task:
    folder: Folder
    name: str
    sha256: str
    bytes: int
    rows: list[_Row]
    categories: frozenset[int]
    decode: bool


@dataclass(frozen=True)
class _Found:
    """Of a shard: findings, and (image, annotation) id of every annotation that has one."""

    problems: list[Problem]
    ids: list[tuple[int, int]]


def verify(shards: Location, *, decode: bool = False, workers: int = 1) -> list[Problem]:
    """Hash every shard again, read every sample by the index, and check what is in it.

    Args:
        shards: folder with a manifest; path or fsspec URL.
        decode: also decode every image; otherwise of a JPEG or PNG only header and end marker are
            looked at.
        workers: processes.

    Returns:
        All findings, with what conversion left out; those of a kind in DAMAGE say that the
        shards are unfit.

    Raises:
        ValueError: the folder or its manifest is unusable.
    """
    folder = folder_at(shards)
    manifest = read_manifest(shards)
    if not folder.everywhere and workers > 1:
        raise ValueError(f"{folder} is seen by one process only; take --workers 1")
    categories = frozenset(category_ids(manifest.categories, str(shards)))
    columns = (manifest.samples[name] for name in _Row._fields)
    rows = [_Row(*row) for row in zip(*columns, strict=True)]
    tasks, start = [], 0
    for shard in manifest.shards:
        own = rows[start : start + shard["samples"]]
        start += shard["samples"]
        name, digest, size = shard["name"], shard["sha256"], shard["bytes"]
        tasks.append(_Task(folder, name, digest, size, own, categories, decode))
    problems = [
        Problem("image left out", row["image_id"], None, f"by convert: {row['reason']}")
        for row in manifest.quarantined
    ]
    problems += [
        Problem("annotation without image", None, row.get("id"), "kept in the manifest")
        for row in manifest.orphan_annotations
    ]
    try:
        problems += header_problems(manifest.header)
    except RecursionError:
        raise ValueError(f"{shards}/manifest.json is damaged: it is nested too deeply") from None
    orphans = [row.get("id") for row in manifest.orphan_annotations]
    seen = {number for number in orphans if type(number) is int}
    with tqdm(total=len(rows), desc="verify", unit="image", disable=None) as bar:
        results = ordered_map(_verify_shard, tasks, max(1, min(workers, len(tasks))))
        for task, found in zip(tasks, results, strict=True):
            problems += found.problems
            problems += _repeated(found.ids, seen)
            bar.update(len(task.rows))
    return problems


def _repeated(ids: Sequence[tuple[int, int]], seen: set[int]) -> list[Problem]:
    problems = []
    for image, number in ids:
        if number in seen:
            detail = f"id {number} is used by more than one annotation"
            problems.append(Problem("duplicate annotation id", image, number, detail))
        seen.add(number)
    return problems


def _verify_shard(task: _Task) -> _Found:
    where = f"{task.folder}/{task.name}"

    def damaged(why: str) -> Problem:
        return Problem("damaged shard", None, None, f"{where}: {why}")

    problems: list[Problem] = []
    ids: list[tuple[int, int]] = []
    try:
        with task.folder.local_copy(task.name) as path, path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if size != task.bytes:
                problems.append(damaged(f"expected {task.bytes} bytes, got {size}"))
            elif digest != task.sha256:
                problems.append(damaged(f"expected SHA-256 {task.sha256}, got {digest}"))
            for row in task.rows:
                data = os.pread(file.fileno(), row.length, row.offset)
                try:
                    found = _verify_sample(task, where, row, data)
                except RecursionError:
                    detail = f"{where}: its JSON is nested too deeply"
                    found = _Found([Problem("damaged sample", row.id, None, detail)], [])
                problems += found.problems
                ids += found.ids
    except ConnectionError:
        raise
    except OSError as error:
        problems = [damaged(error.strerror or str(error))]
    return _Found(problems, ids)


def _verify_sample(task: _Task, where: str, row: _Row, data: bytes) -> _Found:
    def one(kind: str, detail: str) -> _Found:
        return _Found([Problem(kind, row.id, None, f"{where}: {detail}")], [])

    try:
        sample = read_sample(data)
    except ValueError as error:
        return one("damaged sample", str(error))
    image, annotations = sample.record["image"], sample.record["annotations"]
    expected = (sample_key(row.id), row.id, row.annotations)
    if (sample.key, image.get("id"), len(annotations)) != expected:
        why = f"holds {sample.key} with {len(annotations)} annotations, the index says {row[5]}"
        return one("damaged sample", why)
    name = f"{sample.key}.{sample.extension}"
    try:
        header = read_image_header(sample.image)
        if task.decode:
            decode_image(sample.image)
    except TruncatedImage as error:
        return one("truncated image", f"{name}: {error}")
    except UnsupportedImage as error:
        return one("unsupported image", f"{name}: {error}")
    except ValueError as error:
        return one("corrupt image", f"{name}: {error}")
    size = (header.width, header.height)
    recorded = (image.get("width"), image.get("height"))
    problems, ids = [], []
    for told in ((row.width, row.height), recorded):
        mismatch = size_mismatch(told, size, name)
        if mismatch:
            problems.append(Problem("size mismatch", row.id, None, mismatch))
    problems += [Problem(kind, row.id, None, why) for kind, why in record_problems(image)]
    for annotation in annotations:
        number = annotation.get("id")
        if type(number) is int:
            ids.append((row.id, number))
        else:
            detail = f"its id is {number!r:.60}, not an integer"
            problems.append(Problem("invalid annotation id", row.id, None, detail))
        for kind, detail in annotation_problems(annotation, size, task.categories):
            problems.append(Problem(kind, row.id, number, detail))
    return _Found(problems, ids)
