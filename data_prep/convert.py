"""COCO-format images and annotations -> WebDataset shards with a manifest.

The plan (which sample in which shard, in which order) is made first, from the annotation file
and the sizes of the image files alone; then every shard is one task. So any number of processes
writes the same bytes, and after an interruption finished shards are kept.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from data_prep.checks import (
    Problem,
    annotation_problems,
    read_image_header,
    size_mismatch,
)
from data_prep.coco import CocoFile, ImageRecord, category_ids, read_coco
from data_prep.manifest import (
    NAME,
    Manifest,
    data_digest,
    read_manifest,
    write_json,
    write_manifest,
)
from data_prep.parallel import ordered_map
from data_prep.shards import END, encode_member, member_length, sample_key

REPORT = "report.json"
STATE = ".convert"  # while unfinished: plan.json, and one result a finished shard
QUARANTINE = frozenset(
    ("missing image", "corrupt image", "size mismatch", "duplicate image id")
)  # the image and its annotations stay out of the shards; other problems are only reported


@dataclass(frozen=True)
class Conversion:
    """What `convert` leaves: `fresh` is False where the shards were there already."""

    manifest: Manifest
    problems: list[Problem]
    fresh: bool


class _Item(NamedTuple):
    """A sample to be written."""

    id: int
    file_name: str
    width: float | None
    height: float | None
    record: bytes


@dataclass(frozen=True)
class _Task:
    name: str
    output: Path
    images: Path
    categories: frozenset[int]
    items: list[_Item]


@dataclass(frozen=True)
class _Shard:
    """A written shard; `columns` as in the manifest, without shard."""

    name: str
    bytes: int
    sha256: str
    columns: dict[str, list[int]]
    problems: list[Problem]


def convert(
    images: Path,
    annotations: Path,
    output: Path,
    *,
    shard_size_mb: int = 256,
    samples_per_shard: int = 1000,
    seed: int = 0,
    workers: int = 1,
    strict: bool = False,
) -> Conversion:
    """Write `output/shard-*.tar`, `output/report.json` and, last, `output/manifest.json`.

    Samples are shuffled by `seed`. A shard ends at `samples_per_shard` samples or
    `shard_size_mb` MiB, whichever comes first. The result depends on neither `workers` nor an
    interruption before. If `output` holds the shards of this input already, nothing is done.

    Raises:
        ValueError: the input is unusable, `output` holds something else, or `strict` and there
            is any problem.
        OSError: reading or writing fails otherwise.
    """
    for name, value in (("shard_size_mb", shard_size_mb), ("samples_per_shard", samples_per_shard)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not images.is_dir():
        raise ValueError(f"image folder {images} does not exist")
    _refuse_foreign(output)
    coco = read_coco(annotations)
    problems = list(coco.problems)
    problems += [
        Problem(
            "duplicate image id", image.id, None, f"{image.file_name!r}: id {image.id} is taken"
        )
        for image in coco.repeated
    ]
    sizes = {image.id: _file_size(images, image.file_name) for image in coco.images}
    absent = [image for image in coco.images if sizes[image.id] is None]
    if len(absent) == len(coco.images):
        raise ValueError(
            f"none of the {len(absent)} images of {annotations} is in {images} "
            f"(the first would be {absent[0].file_name!r}); is --images the right folder?"
        )
    problems += [
        Problem("missing image", image.id, None, f"no file {image.file_name!r} in the image folder")
        for image in absent
    ]
    options = {"shard_size_mb": shard_size_mb, "samples_per_shard": samples_per_shard, "seed": seed}
    source = {
        "annotations": coco.sha256,
        "images": _digest([[i.id, i.file_name, sizes[i.id]] for i in coco.images]),
        "options": _digest(options),
    }
    if (output / NAME).exists():
        manifest = _same_or_refuse(output, source)
        problems = [Problem(*row) for row in json.loads((output / REPORT).read_bytes())["problems"]]
        _fail_if(strict, problems, output)
        return Conversion(manifest, problems, fresh=False)

    plan = _plan(coco, sizes, shard_size_mb * 2**20, samples_per_shard, seed)
    (output / STATE).mkdir(parents=True, exist_ok=True)
    with _locked(output / STATE):
        shards = _write_shards(coco, plan, images, output, source, workers)
        problems += [problem for shard in shards for problem in shard.problems]
        problems.sort(key=lambda p: (p.kind, p.image_id or 0))
        if not any(shard.columns["id"] for shard in shards):
            raise ValueError(
                f"none of the {len(coco.images)} images of {annotations} is usable "
                f"(the first: {next(p.detail for p in problems if p.kind in QUARANTINE)})"
            )
        manifest = _manifest(coco, shards, problems, source)
        counts = dict(sorted(Counter(problem.kind for problem in problems).items()))
        write_json(output / REPORT, {"counts": counts, "problems": problems})
        _fail_if(strict, problems, output)
        write_manifest(output, manifest)
        shutil.rmtree(output / STATE)
    return Conversion(manifest, problems, fresh=True)


@contextmanager
def _locked(state: Path) -> Iterator[None]:
    """Two conversions into one folder at once would overwrite each other's shards."""
    with (state / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another conversion is writing to {state.parent}; wait for it or stop it"
            ) from None
        yield


def _fail_if(strict: bool, problems: list[Problem], output: Path) -> None:
    if strict and problems:
        raise ValueError(
            f"--strict: {len(problems)} problems, the first: {problems[0].kind}: "
            f"{problems[0].detail} (all are in {output / REPORT}; without --strict unusable "
            "images are left out)"
        )


def _refuse_foreign(output: Path) -> None:
    """Only an empty folder, a complete one or an unfinished one of ours may be written to."""
    if not output.exists():
        return
    if not output.is_dir():
        raise ValueError(f"output {output} is a file; choose a folder")
    names = {path.name for path in output.iterdir()}
    if names and not names & {NAME, STATE}:
        raise ValueError(
            f"output {output} holds something else ({min(names)}); choose a new or empty folder"
        )


def _same_or_refuse(output: Path, source: dict[str, str]) -> Manifest:
    manifest = read_manifest(output)
    changed = [name for name in source if manifest.source.get(name) != source[name]]
    if changed:
        raise ValueError(
            f"output {output} holds shards of other input (differs in: {', '.join(changed)}); "
            "choose another folder or remove it"
        )
    for shard in manifest.shards:
        path = output / shard["name"]
        if not path.is_file() or path.stat().st_size != shard["bytes"]:
            raise ValueError(
                f"{path} is missing or not of {shard['bytes']} bytes; remove {output} and "
                "convert again"
            )
    return manifest


def _file_size(folder: Path, file_name: str) -> int | None:
    """Bytes of an image file; None if there is none inside the folder."""
    root = os.path.abspath(folder)
    try:
        path = os.path.normpath(os.path.join(root, file_name))
        if os.path.commonpath((root, path)) != root or not os.path.isfile(path):
            return None
        return os.stat(path).st_size
    except (OSError, ValueError):  # ValueError: a name with a NUL or a lone surrogate
        return None


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _plan(
    coco: CocoFile,
    sizes: dict[int, int | None],
    most_bytes: int,
    most_samples: int,
    seed: int,
) -> list[list[ImageRecord]]:
    """Images in shuffled order, cut into shards.

    Files sorted by class or video would otherwise be neighbours in a shard, and training
    shuffles within a few shards only. Ordering by a hash needs no generator's stability.
    """

    def rank(image: ImageRecord) -> bytes:
        return hashlib.sha256(f"{seed}:{image.id}".encode()).digest()

    shards: list[list[ImageRecord]] = []
    filled = 0
    for image in sorted((i for i in coco.images if sizes[i.id] is not None), key=rank):
        size = sizes[image.id]
        assert size is not None
        length = member_length(size) + member_length(coco.sample_characters(image))
        if not shards or filled + length > most_bytes or len(shards[-1]) == most_samples:
            shards.append([])
            filled = len(END)
        shards[-1].append(image)
        filled += length
    return shards


def _write_shards(
    coco: CocoFile,
    plan: list[list[ImageRecord]],
    images: Path,
    output: Path,
    source: dict[str, str],
    workers: int,
) -> list[_Shard]:
    """Write the shards that are not there yet; a result file stands for a finished one."""
    state = output / STATE
    plan_file = state / "plan.json"
    if plan_file.exists():
        if json.loads(plan_file.read_bytes()) != source:
            raise ValueError(
                f"output {output} holds an unfinished conversion of other input or options; "
                "choose another folder or remove it"
            )
    else:
        write_json(plan_file, source)
    names = [f"shard-{i:06d}" for i in range(len(plan))]
    done = {name: shard for name in names if (shard := _finished(state, output, name))}
    categories = frozenset(category_ids(coco.header["categories"], str(coco.path)))

    def tasks() -> Iterator[_Task]:
        for name, members in zip(names, plan, strict=True):
            if name not in done:
                items = [
                    _Item(i.id, i.file_name, i.width, i.height, coco.sample_json(i))
                    for i in members
                ]
                yield _Task(name, output, images, categories, items)

    total = sum(len(members) for members in plan)
    start = sum(len(plan[names.index(name)]) for name in done)
    with tqdm(total=total, initial=start, desc="convert", unit="image", disable=None) as bar:
        missing = len(names) - len(done)
        try:
            for shard in ordered_map(_write_shard, tasks(), max(1, min(workers, missing))):
                done[shard.name.removesuffix(".tar")] = shard
                bar.update(len(plan[names.index(shard.name.removesuffix(".tar"))]))
        except BrokenProcessPool:
            raise ValueError(
                "a worker process was killed (out of memory?); run the same command again to "
                "continue, with fewer --workers"
            ) from None
    return [done[name] for name in names]


def _finished(state: Path, output: Path, name: str) -> _Shard | None:
    try:
        content = json.loads((state / f"{name}.json").read_bytes())
        size = (output / f"{name}.tar").stat().st_size
    except (OSError, ValueError):
        return None
    content["problems"] = [Problem(*row) for row in content["problems"]]
    return _Shard(**content) if size == content["bytes"] else None


def _write_shard(task: _Task) -> _Shard:
    columns: dict[str, list[int]] = {
        name: [] for name in ("offset", "length", "width", "height", "id", "annotations")
    }
    problems: list[Problem] = []
    digest = hashlib.sha256()
    path = task.output / f"{task.name}.tar"
    temporary = path.with_suffix(".tar.tmp")
    offset = 0
    with temporary.open("wb") as file:
        for item in task.items:
            try:
                data = (task.images / item.file_name).read_bytes()
                header = read_image_header(data)
            except FileNotFoundError:
                problems.append(Problem("missing image", item.id, None, "vanished meanwhile"))
                continue
            except (OSError, ValueError) as error:
                why = error.strerror if isinstance(error, OSError) else str(error)
                problems.append(
                    Problem("corrupt image", item.id, None, f"{item.file_name!r}: {why}")
                )
                continue
            size = (header.width, header.height)
            mismatch = size_mismatch((item.width, item.height), size, item.file_name)
            if mismatch:
                problems.append(Problem("size mismatch", item.id, None, mismatch))
                continue
            annotations = json.loads(item.record)["annotations"]
            for annotation in annotations:
                for kind, detail in annotation_problems(annotation, size, task.categories):
                    problems.append(Problem(kind, item.id, annotation.get("id"), detail))
            key = sample_key(item.id)
            sample = encode_member(f"{key}.{header.extension}", data)
            sample += encode_member(f"{key}.json", item.record)
            file.write(sample)
            digest.update(sample)
            row = (offset, len(sample), *size, item.id, len(annotations))
            for column, value in zip(columns.values(), row, strict=True):
                column.append(value)
            offset += len(sample)
        file.write(END)
        digest.update(END)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    shard = _Shard(path.name, offset + len(END), digest.hexdigest(), columns, problems)
    write_json(task.output / STATE / f"{task.name}.json", asdict(shard))
    return shard


def _manifest(
    coco: CocoFile, shards: list[_Shard], problems: list[Problem], source: dict[str, str]
) -> Manifest:
    numbers = [i for i, shard in enumerate(shards) for _ in shard.columns["id"]]
    samples = {"shard": numbers} | {
        name: [value for shard in shards for value in shard.columns[name]]
        for name in shards[0].columns
    }
    return Manifest(
        digest=data_digest(coco.header, [shard.sha256 for shard in shards]),
        header=coco.header,
        categories=coco.header["categories"],
        num_images=len(numbers),
        num_annotations=sum(samples["annotations"]),
        quarantined=[
            {"image_id": p.image_id, "reason": f"{p.kind}: {p.detail}"}
            for p in problems
            if p.kind in QUARANTINE
        ],
        orphan_annotations=coco.orphans,
        source=source,
        shards=[
            {
                "name": shard.name,
                "samples": len(shard.columns["id"]),
                "bytes": shard.bytes,
                "sha256": shard.sha256,
            }
            for shard in shards
        ],
        samples=samples,
    )
