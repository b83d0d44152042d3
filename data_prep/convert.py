"""COCO-format images and annotations -> WebDataset shards with a manifest.

Read the annotation file, make a plan, write every shard as one task, and the manifest last. What
is finished survives an interruption: `STATE` in the output holds it until the manifest is there.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.checks import Problem, read_report, report
from data_prep.coco import CocoFile, category_ids, read_coco
from data_prep.hold import held
from data_prep.manifest import NAME, Manifest, data_digest, read_manifest, write_manifest
from data_prep.parallel import OrderedMap, worker_processes
from data_prep.plan import Limits, plan_shards, shard_tasks
from data_prep.storage import (
    TEMPORARY,
    Facts,
    Folder,
    LocalFolder,
    Location,
    file_at,
    folder_at,
    sizes_of,
)
from data_prep.write import STATE, WrittenShard, write_shard

REPORT = "report.json"
PLAN = f"{STATE}/plan.json"
QUARANTINE = frozenset(
    (
        "missing image",
        "corrupt image",
        "truncated image",
        "unsupported image",
        "size mismatch",
        "duplicate image id",
    )
)  # the image and its annotations stay out of the shards; other problems are only reported


@dataclass(frozen=True)
class Conversion:
    """What `convert` leaves: `fresh` is False where the shards were there already."""

    manifest: Manifest
    problems: list[Problem]
    fresh: bool


def convert(
    images: Location,
    annotations: Location,
    output: Location,
    *,
    shard_size_mb: int = 256,
    samples_per_shard: int = 1000,
    seed: int = 0,
    workers: int = 1,
    ray: str | None = None,
    decode: bool = False,
    strict: bool = False,
) -> Conversion:
    """Write `output/shard-*.tar`, `output/report.json` and, last, `output/manifest.json`.

    Samples are shuffled by `seed`. A shard ends at `samples_per_shard` samples or
    `shard_size_mb` MiB, whichever comes first. The result depends on neither `workers`, `ray` nor
    an interruption before. If `output` holds the shards of this input already, nothing is done.

    Args:
        images: folder that file names are relative to; path or fsspec URL, as the next two.
        annotations: the annotation file.
        output: folder for the shards.
        shard_size_mb: see above.
        samples_per_shard: see above.
        seed: see above.
        workers: processes on this machine.
        ray: write the shards on the Ray cluster at this address; see `data_prep.on_ray`.
        decode: decode every image, and leave out those that are damaged; otherwise a JPEG or PNG
            is judged by its header and end marker.
        strict: fail if there is any problem.

    Raises:
        ValueError: the input is unusable, `output` holds something else, or `strict` and there
            is any problem.
        OSError: reading or writing fails otherwise.
    """
    for name, value in (("shard_size_mb", shard_size_mb), ("samples_per_shard", samples_per_shard)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    source, target = folder_at(images), folder_at(output)
    if isinstance(source, LocalFolder) and source.names() is None:
        raise ValueError(f"image folder {source} does not exist")
    for folder in (source, target):
        if not folder.everywhere and (workers > 1 or ray is not None):
            raise ValueError(f"{folder} is seen by one process only: use --workers 1, no --ray")
    finished = _is_finished(target)
    _tell(f"reading the annotation file {annotations}")
    with _local_file(annotations) as path, worker_processes(workers) as ordered:
        coco = read_coco(path, ordered, annotations)
        _tell(f"looking for {len(coco.images)} images in {source}")
        facts = source.facts([image.file_name for image in coco.images])
        sizes = sizes_of(facts)
        problems = _problems_before(coco, sizes, source)
        options = {
            "shard_size_mb": shard_size_mb,
            "samples_per_shard": samples_per_shard,
            "seed": seed,
            # Left out where it is not asked for, as in the shards of earlier versions.
            **({"decode": True} if decode else {}),
        }
        identity = _identity(coco, sizes, options)
        with nullcontext() if finished else _locked(target):
            # Another conversion may have finished here while this one was reading.
            if finished or _is_finished(target):
                return _done_before(target, identity, strict)
            _begin_or_continue(target, identity)
            plan = plan_shards(coco, sizes, Limits(shard_size_mb * 2**20, samples_per_shard), seed)
            with nullcontext(ordered) if ray is None else _on_ray(ray) as spread:
                shards = _write_shards(coco, facts, plan, source, target, spread, decode)
            _refuse_absent(shards, target)
            problems += [problem for shard in shards for problem in shard.problems]
            problems.sort(key=lambda p: (p.kind, p.image_id or 0))
            if not any(shard.columns["id"] for shard in shards):
                raise ValueError(
                    f"none of the {len(coco.images)} images of {annotations} is usable "
                    f"(the first: {next(p.detail for p in problems if p.kind in QUARANTINE)})"
                )
            manifest = _manifest(coco, shards, problems, identity)
            target.write(REPORT, report(problems))
            _fail_if(strict, problems, target)
            write_manifest(target, manifest)
    # Network file systems keep a folder in which a file is open, as the lock was.
    target.remove(STATE)
    return Conversion(manifest, problems, fresh=True)


def _tell(line: str) -> None:
    """What takes seconds and has no bar, to who watches."""
    if sys.stderr.isatty():
        print(line, file=sys.stderr)


def _identity(coco: CocoFile, sizes: list[int | None], options: dict[str, int]) -> dict[str, str]:
    """Digests of the annotation file, of the image names and sizes, and of the options."""
    images = [[i.id, i.file_name, n] for i, n in zip(coco.images, sizes, strict=True)]
    return {"annotations": coco.sha256, "images": _digest(images), "options": _digest(options)}


def _done_before(output: Folder, identity: dict[str, str], strict: bool) -> Conversion:
    manifest = _same_or_refuse(output, identity)
    with _naming(output, REPORT):
        problems = read_report(output.read(REPORT))
    _fail_if(strict, problems, output)
    return Conversion(manifest, problems, fresh=False)


@contextmanager
def _naming(output: Folder, name: str) -> Iterator[None]:
    """Say which of our own files it is that cannot be read, and what helps."""
    try:
        yield
    except (ValueError, TypeError, LookupError):
        raise ValueError(f"{output}/{name} is damaged; remove {output} and convert again") from None


def _problems_before(coco: CocoFile, sizes: list[int | None], images: Folder) -> list[Problem]:
    """What is wrong judging by the annotation file and the list of image files."""
    problems = coco.problems + [
        Problem(
            "duplicate image id", image.id, None, f"{image.file_name!r}: id {image.id} is taken"
        )
        for image in coco.repeated
    ]
    absent = [image for image, size in zip(coco.images, sizes, strict=True) if size is None]
    if len(absent) == len(coco.images):
        raise ValueError(
            f"none of the {len(absent)} images of {coco.origin} is in {images} "
            f"(the first would be {absent[0].file_name!r}); is --images the right folder?"
        )
    problems += [
        Problem("missing image", image.id, None, f"no file {image.file_name!r} in the image folder")
        for image in absent
    ]
    return problems


@contextmanager
def _local_file(annotations: Location) -> Iterator[Path]:
    folder, name = file_at(annotations)
    with ExitStack() as stack:
        try:
            path = stack.enter_context(folder.local_copy(name))
        except FileNotFoundError:
            raise ValueError(f"cannot read annotation file {annotations}: no such file") from None
        yield path


@contextmanager
def _on_ray(address: str) -> Iterator[OrderedMap]:
    from data_prep.on_ray import ray_cluster  # takes seconds, and only --ray needs it

    with ray_cluster(address) as ordered:
        yield ordered


@contextmanager
def _locked(output: Folder) -> Iterator[None]:
    """Keep out a second conversion into the same local folder.

    A store has no locks. There both would write the same bytes to the same names.
    """
    if not isinstance(output, LocalFolder):
        yield
        return
    with ExitStack() as stack:
        try:
            stack.enter_context(held(output.path / STATE, wait=False))
        except BlockingIOError:
            raise ValueError(
                f"another conversion is writing to {output}; wait for it or stop it"
            ) from None
        _remove_torn(output.path)
        yield


def _remove_torn(output: Path) -> None:
    """Remove what a killed run had begun to write."""
    for pattern in (f"{STATE}/*{TEMPORARY}", *(f"{name}.*{TEMPORARY}" for name in (NAME, REPORT))):
        for left in output.glob(pattern):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def _begin_or_continue(output: Folder, identity: dict[str, str]) -> None:
    if output.sizes([PLAN]) == [None]:
        output.write(PLAN, json.dumps(identity).encode())
        return
    with _naming(output, PLAN):
        begun = json.loads(output.read(PLAN))
    if begun != identity:
        raise ValueError(
            f"output {output} holds an unfinished conversion of other input or options; "
            "choose another folder or remove it"
        )


def _fail_if(strict: bool, problems: list[Problem], output: Folder) -> None:
    if strict and problems:
        raise ValueError(
            f"--strict: {len(problems)} problems, the first: {problems[0].kind}: "
            f"{problems[0].detail} (all are in {output}/{REPORT}; without --strict unusable "
            "images are left out)"
        )


def _is_finished(output: Folder) -> bool:
    """Whether there is a manifest. What was there before it goes then.

    Raises:
        ValueError: the folder is neither empty nor a finished or unfinished one of ours.
    """
    names = output.names() or set()
    if names and not names & {NAME, STATE}:
        raise ValueError(
            f"output {output} holds something else ({min(names)}); choose a new or empty folder"
        )
    if {NAME, STATE} <= names:  # killed between the two, or just ending
        output.remove(STATE)
    return NAME in names


def _same_or_refuse(output: Folder, identity: dict[str, str]) -> Manifest:
    manifest = read_manifest(str(output))
    changed = [name for name in identity if manifest.source.get(name) != identity[name]]
    if changed:
        raise ValueError(
            f"output {output} holds shards of other input (differs in: {', '.join(changed)}); "
            "choose another folder or remove it"
        )
    sizes = output.sizes([shard["name"] for shard in manifest.shards])
    for shard, size in zip(manifest.shards, sizes, strict=True):
        if size != shard["bytes"]:
            raise ValueError(
                f"{output}/{shard['name']} is missing or not of {shard['bytes']} bytes; remove "
                f"{output} and convert again"
            )
    return manifest


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _write_shards(
    coco: CocoFile,
    facts: list[Facts | None],
    plan: list[list[int]],
    images: Folder,
    output: Folder,
    ordered: OrderedMap,
    decode: bool,
) -> list[WrittenShard]:
    categories = frozenset(category_ids(coco.header["categories"], coco.origin))
    tasks = shard_tasks(coco, facts, plan, images, output, categories, decode)
    shards: list[WrittenShard] = []
    total = sum(len(members) for members in plan)
    with tqdm(total=total, desc="convert", unit="image", disable=None) as bar:
        for shard in ordered(write_shard, tasks):
            bar.update(len(plan[len(shards)]))
            shards.append(shard)
    return shards


def _refuse_absent(shards: list[WrittenShard], output: Folder) -> None:
    """A shard that was written and is not here went to another disk of the same name."""
    sizes = output.sizes([shard.name for shard in shards])
    for shard, size in zip(shards, sizes, strict=True):
        if size != shard.bytes:
            got = "no file" if size is None else f"{size} bytes"
            raise ValueError(
                f"{output}/{shard.name}: got {got}, expected the {shard.bytes} bytes that were "
                "written; do all nodes see the same storage under this path? Choose an --output "
                "that they share, or leave --ray out"
            )


def _manifest(
    coco: CocoFile, shards: list[WrittenShard], problems: list[Problem], source: dict[str, str]
) -> Manifest:
    numbers = [i for i, shard in enumerate(shards) for _ in shard.columns["id"]]
    samples = {"shard": numbers} | {
        name: [value for shard in shards for value in shard.columns[name]]
        for name in shards[0].columns
    }
    own = {image.id: coco.annotation_count(i) for i, image in enumerate(coco.images)}
    # A repeated record has none: they belong to the first of its id.
    left_out = [
        {
            "image_id": p.image_id,
            "annotations": 0 if p.kind == "duplicate image id" else own[p.image_id],
            "reason": f"{p.kind}: {p.detail}",
        }
        for p in problems
        if p.kind in QUARANTINE and p.image_id is not None
    ]
    return Manifest(
        digest=data_digest(coco.header, [shard.sha256 for shard in shards]),
        header=coco.header,
        keys=coco.keys,
        categories=coco.header["categories"],
        num_images=len(numbers),
        num_annotations=sum(samples["annotations"]),
        quarantined=left_out,
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
