"""Are these shards what their manifest says, and fit to train on?"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data_prep.checks import (
    Problem,
    annotation_problems,
    decode_image,
    read_image_header,
    size_mismatch,
)
from data_prep.coco import category_ids
from data_prep.manifest import read_manifest
from data_prep.parallel import ordered_map
from data_prep.shards import read_sample, sample_key

# What makes shards unfit. Other findings were in the data when it was converted.
DAMAGE = frozenset(("damaged shard", "damaged sample", "corrupt image", "size mismatch"))


@dataclass(frozen=True)
class _Task:
    path: Path
    sha256: str
    bytes: int
    rows: list[tuple[int, int, int, int, int, int]]  # COLUMNS of the manifest, without shard
    categories: frozenset[int]
    decode: bool


def verify(shards: Path, *, decode: bool = False, workers: int = 1) -> list[Problem]:
    """Hash every shard again, read every sample by the index, and check what is in it.

    Args:
        shards: folder with a manifest.
        decode: also decode every image; otherwise only header and end marker are looked at.
        workers: processes.

    Returns:
        All findings; those of a kind in DAMAGE say that the shards are unfit.

    Raises:
        ValueError: the folder or its manifest is unusable.
    """
    manifest = read_manifest(shards)
    categories = frozenset(category_ids(manifest.categories, str(shards)))
    columns = manifest.samples
    rows = list(
        zip(
            *(columns[c] for c in ("offset", "length", "width", "height", "id", "annotations")),
            strict=True,
        )
    )
    tasks, start = [], 0
    for shard in manifest.shards:
        own = rows[start : start + shard["samples"]]
        start += shard["samples"]
        path = shards / shard["name"]
        tasks.append(_Task(path, shard["sha256"], shard["bytes"], own, categories, decode))
    problems: list[Problem] = []
    with tqdm(total=len(rows), desc="verify", unit="image", disable=None) as bar:
        results = ordered_map(_verify_shard, tasks, max(1, min(workers, len(tasks))))
        for task, found in zip(tasks, results, strict=True):
            problems += found
            bar.update(len(task.rows))
    return problems


def _verify_shard(task: _Task) -> list[Problem]:
    def damaged(why: str) -> Problem:
        return Problem("damaged shard", None, None, f"{task.path}: {why}")

    try:
        with task.path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            found = hashlib.file_digest(file, "sha256").hexdigest()
            problems = []
            if size != task.bytes:
                problems.append(damaged(f"expected {task.bytes} bytes, got {size}"))
            elif found != task.sha256:
                problems.append(damaged(f"expected SHA-256 {task.sha256}, got {found}"))
            for row in task.rows:
                problems += _verify_sample(task, row, os.pread(file.fileno(), row[1], row[0]))
            return problems
    except OSError as error:
        return [damaged(error.strerror or str(error))]


def _verify_sample(
    task: _Task, row: tuple[int, int, int, int, int, int], data: bytes
) -> list[Problem]:
    _, _, width, height, image_id, count = row
    try:
        sample = read_sample(data)
    except ValueError as error:
        return [Problem("damaged sample", image_id, None, f"{task.path}: {error}")]
    annotations = sample.record["annotations"]
    if (sample.key, sample.record["image"].get("id"), len(annotations)) != (
        sample_key(image_id),
        image_id,
        count,
    ):
        why = f"holds {sample.key} with {len(annotations)} annotations, the index says {count}"
        return [Problem("damaged sample", image_id, None, f"{task.path}: {why}")]
    try:
        header = read_image_header(sample.image)
        if task.decode:
            decode_image(sample.image)
    except ValueError as error:
        return [Problem("corrupt image", image_id, None, f"{task.path}: {error}")]
    size = (header.width, header.height)
    mismatch = size_mismatch((width, height), size, f"{sample.key}.{sample.extension}")
    problems = [Problem("size mismatch", image_id, None, mismatch)] if mismatch else []
    for annotation in annotations:
        for kind, detail in annotation_problems(annotation, size, task.categories):
            problems.append(Problem(kind, image_id, annotation.get("id"), detail))
    return problems
