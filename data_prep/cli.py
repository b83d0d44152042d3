"""The command line of the package: options, what is printed, and exit statuses."""

import contextlib
import difflib
import functools
import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from itertools import dropwhile
from pathlib import Path
from typing import Annotated, Any

import tyro

from data_prep.checks import report, summary_table
from data_prep.convert import REPORT
from data_prep.convert import convert as convert_shards
from data_prep.export import export as export_annotations
from data_prep.machine_errors import in_a_line
from data_prep.parallel import default_workers
from data_prep.split import TRAIN, VAL
from data_prep.split import split as split_annotations
from data_prep.stats import collect, save_plots, tables
from data_prep.synthesize import synthesize as draw_data_set
from data_prep.urls import masked
from data_prep.verify import DAMAGE
from data_prep.verify import verify as verify_shards

DEBUG = "--debug"
WORKERS = default_workers()
Folder = Annotated[Path, tyro.conf.arg(metavar="DIR")]
AnyFolder = Annotated[str, tyro.conf.arg(metavar="DIR|URL")]
AnyFile = Annotated[str, tyro.conf.arg(metavar="FILE|URL")]


def synthesize(
    output: Folder, train: int = 2000, val: int = 200, seed: int = 0, workers: int = WORKERS
) -> None:
    """Draw a small data set of shapes in COCO format.

    Example: python -m data_prep synthesize --output outputs/shapes --train 2000 --val 200

    Args:
        output: New folder for train/, val/ and annotations/.
        train: Pictures in the training split.
        val: Pictures in the validation split.
        seed: Equal seeds give equal files.
        workers: Processes; the files do not depend on it.
    """
    if draw_data_set(output, train, val, seed, workers):
        print(f"{output}: drew {train} training and {val} validation pictures")
    else:
        print(f"{output}: these pictures are there already, nothing to do")


def convert(
    images: AnyFolder,
    annotations: AnyFile,
    output: AnyFolder,
    shard_size_mb: int = 256,
    samples_per_shard: int = 1000,
    seed: int = 0,
    workers: int = WORKERS,
    ray: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="[ADDRESS]")] = None,
    decode: bool = False,
    strict: bool = False,
) -> None:
    """Convert COCO-format images and annotations to WebDataset shards.

    Example: python -m data_prep convert --images coco/train2017 --annotations
    coco/annotations/instances_train2017.json --output shards/train2017

    Args:
        images: Folder that the file names in the annotations are relative to.
        annotations: Annotation file in COCO's JSON format.
        output: New folder for the shards; an interrupted conversion is continued.
        shard_size_mb: Start another shard at this size in MiB...
        samples_per_shard: ...or at this number of images.
        seed: Images are shuffled by it.
        workers: Processes; the shards do not depend on it.
        ray: Write the shards on a Ray cluster: host:port, ray://host:port, "local" to start one
            for this command, or without an address that of RAY_ADDRESS or this machine. All its
            machines must see the folders.
        decode: Decode every image too, and leave out damaged ones: without it, damage in the
            middle of a JPEG or PNG file is not seen. Takes a core 1.2 ms for a JPEG of 640x480.
        strict: Fail on any problem, instead of leaving unusable images out.
    """
    if ray is not None and len(ray) > 1:
        raise ValueError(f"--ray takes one address, got {' '.join(ray)}")
    result = convert_shards(
        images,
        annotations,
        output,
        shard_size_mb=shard_size_mb,
        samples_per_shard=samples_per_shard,
        seed=seed,
        workers=workers,
        ray=None if ray is None else (*ray, "auto")[0],
        decode=decode,
        strict=strict,
    )
    manifest = result.manifest
    if not result.fresh:
        print(f"{output}: these shards are there already, nothing to do")
    if result.problems:
        print(summary_table(result.problems))
        print(f"details: {output}/{REPORT}")
    # Shards of earlier versions do not know how many annotations were left out.
    lost = sum(row.get("annotations", 0) for row in manifest.quarantined)
    print(
        f"{output}: {manifest.num_images} images with {manifest.num_annotations} annotations in "
        f"{len(manifest.shards)} shards; left out: {len(manifest.quarantined)} images with {lost} "
        "annotations"
    )
    print(f"digest {manifest.digest}")


def export(shards: tyro.conf.Positional[AnyFolder], output: AnyFile) -> None:
    """Write back the annotation file that shards were made from.

    Example: python -m data_prep export shards/train2017 --output instances_train2017.json

    Args:
        shards: Folder made by convert.
        output: Annotation file to write; must not exist.
    """
    manifest = export_annotations(shards, output)
    count = manifest.num_annotations + len(manifest.orphan_annotations)
    print(f"{output}: {manifest.num_images} images, {count} annotations")
    if manifest.quarantined:
        first = ", ".join(str(row["image_id"]) for row in manifest.quarantined[:5])
        print(
            f"not in it: {len(manifest.quarantined)} images that conversion left out, with their "
            f"annotations (ids {first}{', ...' if len(manifest.quarantined) > 5 else ''})"
        )


def split(
    annotations: Annotated[Path, tyro.conf.arg(metavar="FILE")],
    output: Folder,
    share: float = 0.2,
    seed: int = 0,
    by: str = "",
) -> None:
    """Split an annotation file into a training and a validation file.

    Every class that two or more images have is in both, as far as that can be. Example:
    python -m data_prep split --annotations labels.json --output labels-split --share 0.2

    Args:
        annotations: Annotation file in COCO's JSON format.
        output: Folder for train.json and val.json.
        share: Of the images, for validation.
        seed: Equal seeds give equal files.
        by: Images that agree in this field of their records, such as video_id, stay together, or
            those of one folder with "folder": frames of a video must not be in both.
    """
    parts = split_annotations(annotations, output, share=share, seed=seed, by=by)
    print(f"{output / TRAIN}: {parts.train} images; {output / VAL}: {parts.val} images")
    for name, lacking in ((TRAIN, parts.only_in_val), (VAL, parts.only_in_train)):
        if lacking:
            print(f"{name} has no object of {', '.join(lacking)}: too few images have one")


def verify(
    shards: tyro.conf.Positional[AnyFolder],
    decode: bool = False,
    output: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    strict: bool = False,
    workers: int = WORKERS,
) -> None:
    """Check shards against their manifest, and what is in them; status 2 if they are damaged.

    Example: python -m data_prep verify shards/train2017 --output report.json

    Args:
        shards: Folder made by convert.
        decode: Decode every image too, which finds damage in the middle of a JPEG or PNG file that
            was there before converting.
        output: Write all findings there as JSON.
        strict: Fail on any finding, not on damage only.
        workers: Processes.
    """
    if output is not None:
        _fail_unless_writable(output)
    problems = verify_shards(shards, decode=decode, workers=workers)
    if problems:
        print(summary_table(problems))
    if output is not None:
        output.write_bytes(report(problems))
        print(f"details: {output}")
    damage = [problem for problem in problems if problem.kind in DAMAGE]
    if damage:
        raise ValueError(
            f"{shards} is damaged, {len(damage)} findings, the first: "
            f"{damage[0].kind}: {damage[0].detail}"
        )
    if strict and problems:
        raise ValueError(
            f"--strict: {len(problems)} findings in {shards}, the first: "
            f"{problems[0].kind}: {problems[0].detail}"
        )
    print(f"{shards}: shards, index and samples are as the manifest says")


def _fail_unless_writable(path: Path) -> None:
    """Raise the OSError that writing the file would raise; a file that is there stays as it is."""
    if not path.parent.exists():
        path.parent.mkdir(parents=True)
    new = not path.exists()
    with path.open("ab"):
        pass
    if new:
        path.unlink()


def stats(
    shards: tyro.conf.Positional[AnyFolder],
    output: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None,
) -> None:
    """Print tables of classes, sizes and shapes, and save plots of them.

    Example: python -m data_prep stats shards/train2017 --output outputs/stats

    Args:
        shards: Folder made by convert.
        output: Folder for the plots; without it, no plots.
    """
    collected = collect(shards)
    print(tables(collected))
    if output is not None:
        print("plots: " + ", ".join(str(path) for path in save_plots(collected, output)))


def _deferred(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """A function of the same options that only says what is to be run."""

    @functools.wraps(command)
    def chosen(*args: Any, **options: Any) -> Callable[[], None]:
        return lambda: command(*args, **options)

    return chosen


def parse(argv: list[str]) -> Callable[[], None]:
    """What the command line asks for. A mistake in it raises ValueError."""
    commands = {
        c.__name__: _deferred(c) for c in (synthesize, convert, export, split, verify, stats)
    }
    given = argv[0] if argv else ""
    if given and not given.startswith("-") and given not in commands:
        nearest = difflib.get_close_matches(given, commands, n=1, cutoff=0.4)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise ValueError(f"unknown command {given!r}: {hint}expected one of {', '.join(commands)}")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.extras.subcommand_cli_from_dict(
                commands,
                prog="python -m data_prep",
                description="COCO-format data to WebDataset shards and back.",
                args=argv,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(_one_line(said.getvalue())) from None


def _one_line(panel: str) -> str:
    """tyro's framed message as one line: what is wrong, and the option it might have meant."""
    # Where the terminal has no line characters, the frame is a rule of hyphens below the title.
    rows = [line.strip("│╭╰╮╯ ") for line in panel.splitlines()][1:]
    rows = list(dropwhile(_is_rule, rows))
    rule = next((i for i, row in enumerate(rows) if _is_rule(row)), len(rows))
    missing = [row.split()[0] for row in rows[:rule] if row.startswith("--")]
    nearest = [row.split()[0] for row in rows[rule:] if row.startswith("--") and not _is_rule(row)]
    message = " ".join(row for row in rows[:rule] if row and not row.startswith("--"))
    if missing:  # what tyro lists then are the options given that it does not know
        given = f"; got {', '.join(nearest)}, which is none" if nearest else ""
        return f"{rows[0]} {', '.join(missing)}{given}"
    # Below a value that cannot be read tyro shows the help of the option that was given.
    if nearest and not message.startswith("Error parsing"):
        return f"{message}; did you mean {nearest[0]}?"
    return message


def _is_rule(row: str) -> bool:
    return len(row) > 2 and set(row) <= {"─", "-"}


def main(argv: Sequence[str]) -> int:
    """Runs a subcommand and returns the exit status: 0, 2 after a user's mistake or where the
    machine fails, 1 after any other failure, which is a bug; 130 where it was interrupted.

    Either is one line on stderr; with `--debug` anywhere in `argv`, or DETR_DEBUG=1 in the
    environment, its traceback comes before.
    """
    debug = DEBUG in argv or os.environ.get("DETR_DEBUG") == "1"
    try:
        parse([word for word in argv if word != DEBUG])()
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            sys.stderr.write(masked(traceback.format_exc()))
        line, status = _told(error)
        hint = "" if debug or status == 2 else f" ({DEBUG} shows where)"
        print(f"error: {masked(' '.join(line.splitlines()))}{hint}", file=sys.stderr)
        return status
    return 0


def _told(error: Exception) -> tuple[str, int]:
    """What went wrong, and the exit status."""
    if isinstance(error, OSError):
        return in_a_line(error), 2
    if isinstance(error, ValueError):
        return str(error), 2
    said = (str(error).strip().splitlines() or [""])[0]
    return (
        f"{type(error).__name__}: {said}; this is a bug of ours: docs/errors.md says where to "
        f"report it"
    ), 1
