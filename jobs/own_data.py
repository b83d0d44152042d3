"""`python -m jobs train`: from a folder of pictures and a COCO file to a detector, in one command.

Split, conversion, label check, defaults for few images, training, report. Each step is left alone
where it is done already, so the same command goes on after an interruption.
"""

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from jobs.demo import step
from jobs.grid_state import Code
from jobs.launch import launch
from jobs.own_data_report import Prepared, found, in_shards, report
from jobs.own_data_start import beginning, check_weights, starts_from, with_weights
from jobs.spec import ROOT, JobSpec, from_the_root
from jobs.tracking import check_tracking_uri
from pipeline.cli import REQUIRED, RunOptions, parse
from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.fine_tuning import Default, as_option, fine_tuning, value_of
from pipeline.recipes import recipe
from pipeline.sanity import Finding
from pipeline.whole_file import write_whole

RECIPE = "deformable_detr_r50_two_stage"
PROG = "python -m jobs train"
LIST = "python -m pipeline recipes"


@dataclass(frozen=True)
class OwnDataOptions:
    config: RunOptions
    images: Path = REQUIRED
    """Folder that the file names in the annotations are relative to."""
    annotations: Path = REQUIRED
    """Annotation file in COCO's JSON format."""
    output: Path = REQUIRED
    """Folder for shards, run and report. The same command again goes on there."""
    recipe: str = RECIPE
    """The model and how it is trained. `python -m pipeline recipes` lists the names; with _demo
    behind one, or demo, it is small enough for a CPU."""
    val_images: Path | None = None
    """Folder of the validation images. Default: --images."""
    val_annotations: Path | None = None
    """Annotation file of the validation images. Default: --val-share of --annotations."""
    val_share: float = 0.2
    """Share of the images for validation, where no --val-annotations are given."""
    split_by: str = ""
    """Images that agree in this field of their records, such as video_id, or lie in one folder
    ("folder"), stay together: frames of one video in both parts make AP too good to be true."""
    weights: Path | None = None
    """A detector to start from: a published checkpoint of the recipe, or a run of ours."""
    prepare_only: bool = False
    """Convert, check the labels, print the defaults, and stop before training."""
    train_anyway: bool = False
    """Train even where the label check is sure that the boxes are in another format."""
    address: str = ""
    """Ray Jobs address, such as http://HOST:8265. Empty: a local Ray for this job alone."""
    workers: int = 1
    """Training processes; each takes a GPU where the cluster has them."""
    cpus_per_worker: int = 1
    tracking_uri: str = ""
    """MLflow. Empty: the node's MLFLOW_TRACKING_URI, else an SQLite store in --output."""
    experiment: str = "own-data"


def run_train(args: list[str]) -> None:
    name, args = recipe_of(args)
    description = (
        "Trains on your own COCO-format data: split, conversion, label check, defaults for few "
        f"images, training, report.\n\nExample: {PROG} --images pictures --annotations labels.json "
        f"--recipe {RECIPE} --weights official.pth --output outputs/own"
    )
    default = OwnDataOptions(config=recipe(name or RECIPE), recipe=name or RECIPE)
    options = parse(OwnDataOptions, args, PROG, description, default)
    check(options)
    print(beginning(options.config, not name, options.workers, options.address), flush=True)
    check_weights(with_weights(options.config, options.weights))
    shards = prepare(options)
    # Once more, now that the number of images says what the defaults are.
    chosen, defaults = fine_tuning(
        default.config,
        _images_in(shards / "train"),
        options.config.optimizer.batch_size if is_given(args, "optimizer.batch_size") else 0,
        options.config.schedule.epochs if is_given(args, "schedule.epochs") else 0,
    )
    options = parse(OwnDataOptions, args, PROG, description, replace(default, config=chosen))
    config = complete(options, shards)
    run = options.output.resolve() / "run"
    finished = is_finished(run, config)
    given = {default.field for default in defaults if is_given(args, default.field)}
    prepared = check_data(options, config, shards, told(config, defaults, given))
    if options.prepare_only:
        print(f"prepared in {options.output}; without --prepare-only it is trained")
        return
    if not finished:
        train(options, config, run)
    print(
        report(
            options.output.resolve(), prepared, [*PROG.split(), "--recipe", options.recipe, *args]
        )
    )


def recipe_of(args: list[str]) -> tuple[str, list[str]]:
    """The recipe's name ("": none is given), and the other arguments."""
    name, rest, given = "", [], iter(args)
    for argument in given:
        if argument == "--recipe":
            name = _named(next(given, ""))
        elif argument.startswith("--recipe="):
            name = _named(argument.removeprefix("--recipe="))
        else:
            rest.append(argument)
    return name, rest


def _named(name: str) -> str:
    if not name or name.startswith("-"):
        raise UserError(f"--recipe: got {name!r}, expected a name; `{LIST}` lists them")
    return name


def is_given(args: list[str], field: str) -> bool:
    """Whether --field is among the arguments, with dashes or underscores, with = or a space."""
    options = {argument.split("=")[0].replace("_", "-") for argument in args}
    return f"--{field.replace('_', '-')}" in options


def check(options: OwnDataOptions) -> None:
    """Raises `UserError` for what can be seen to be wrong before anything is read."""
    folders = [("images", options.images), ("val-images", options.val_images)]
    files = [("annotations", options.annotations), ("val-annotations", options.val_annotations)]
    for name, path in folders:
        if path and not path.is_dir():
            raise UserError(f"--{name} {path}: no such folder; expected one with the pictures")
    for name, path in files:
        if path and not path.is_file():
            raise UserError(f"--{name} {path}: no such file; expected COCO's JSON")
    if options.val_images and not options.val_annotations:
        raise UserError("--val-images needs --val-annotations: the labels of those images")
    if options.weights and not options.weights.exists():
        raise UserError(f"--weights {options.weights}: no such file or folder")
    if not 0 < options.val_share < 1:
        raise UserError(f"--val-share: got {options.val_share:g}, expected between 0 and 1")
    if options.workers < 1 or options.cpus_per_worker < 1:
        raise UserError(
            f"workers {options.workers}, cpus-per-worker {options.cpus_per_worker}: expected at "
            f"least 1"
        )
    check_tracking_uri(options.tracking_uri)


def prepare(options: OwnDataOptions) -> Path:
    """The folder of the shards `train` and `val`, made where they are not there yet."""
    output = options.output.resolve()
    remember(output, options)
    annotations, val_images = options.annotations.resolve(), options.images.resolve()
    if options.val_annotations:
        val_annotations = options.val_annotations.resolve()
        val_images = (options.val_images or options.images).resolve()
    else:
        step("splitting")
        data_prep(
            "split", "--annotations", annotations, "--output", output / "split",
            "--share", options.val_share, "--seed", options.config.seed,
            *(["--by", options.split_by] if options.split_by else []),
        )  # fmt: skip
        annotations, val_annotations = output / "split/train.json", output / "split/val.json"
    for part, images, file in (
        ("train", options.images.resolve(), annotations),
        ("val", val_images, val_annotations),
    ):
        step(f"converting {part}")
        data_prep(
            "convert", "--images", images, "--annotations", file,
            # Nobody has looked at these files, and training would learn from damaged ones.
            "--output", output / "shards" / part, "--decode",
        )  # fmt: skip
    return output / "shards"


def remember(output: Path, options: OwnDataOptions) -> None:
    """Writes what the folder is made of. What was made of other data is removed where nothing was
    trained on it; else, and for a folder of something else, raises `UserError`."""
    split = {"share": options.val_share, "seed": options.config.seed, "split_by": options.split_by}
    given = {
        "annotations": _digest(options.annotations),
        "images": str(options.images.resolve()),
        "val_annotations": _digest(options.val_annotations) if options.val_annotations else "",
        "val_images": str(options.val_images.resolve()) if options.val_images else "",
        "decode": True,
        **({} if options.val_annotations else split),
    }
    path = output / "data.json"
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in {**before, **given} if before.get(name) != given.get(name)]
        if changed and (output / "run").exists():
            raise UserError(
                f"--output {output} holds a training on other data (differs in: "
                f"{', '.join(changed)}); choose another --output, or remove it to begin anew"
            )
        if changed:
            print(f"{output}: nothing is trained there; made anew for other {', '.join(changed)}")
            for made in ("split", "shards"):
                shutil.rmtree(output / made, ignore_errors=True)
    elif output.is_dir() and any(output.iterdir()):
        raise UserError(f"--output {output} holds something else; choose a new or empty folder")
    output.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(given, indent=1))


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def data_prep(*arguments: object) -> None:
    """Runs a command of data_prep. Raises `UserError` with its message where it fails."""
    command = [sys.executable, "-m", "data_prep", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"])[-1]
        raise UserError(f"data_prep {arguments[0]}: {last.removeprefix('error: ')}")


def _images_in(shards: Path) -> int:
    return int(json.loads((shards / "manifest.json").read_text(encoding="utf-8"))["num_images"])


def complete(options: OwnDataOptions, shards: Path) -> RunConfig:
    """The config with data and weights. Raises `UserError` for what does not go together."""
    from pipeline.data.loader import micro_batch_size  # brings torch
    from pipeline.dataset import open_dataset

    config = options.config
    data = replace(config.data, train=str(shards / "train"), val=str(shards / "val"))
    config = from_the_root(replace(with_weights(config, options.weights), data=data))
    micro_batch_size(config, options.workers)
    open_dataset(config)
    return config


def told(config: RunConfig, defaults: list[Default], given: set[str]) -> list[str]:
    """The defaults with their reasons, and those that were given instead, as options."""
    size = config.augment
    return [
        *(
            f"{as_option(d.field, value_of(config, d.field))}: given"
            if d.field in given
            else str(d)
            for d in defaults
        ),
        f"--augment.val-short-side {size.val_short_side} --augment.max-side {size.max_side}: as in "
        f"the recipe; weights do best at the size that they were trained at",
    ]


def check_data(
    options: OwnDataOptions, config: RunConfig, shards: Path, defaults: list[str]
) -> Prepared:
    """Prints and returns what the data are, what looks wrong with them, and the defaults. Raises
    `UserError` where the labels are surely wrong, unless they are to be trained on anyway."""
    from pipeline.data.shards import ShardSet
    from pipeline.sanity_labels import check_labels, left_out, shared_images

    output = options.output.resolve()
    files = (options.annotations, options.val_annotations)
    if not options.val_annotations:
        files = (output / "split/train.json", output / "split/val.json")
    train, val = (json.loads(file.read_text(encoding="utf-8-sig")) for file in files if file)
    sets = [ShardSet(shards / part) for part in ("train", "val")]
    trained, validated = (
        in_shards(content, shard_set.image_id.tolist())
        for content, shard_set in zip((train, val), sets, strict=True)
    )
    findings: list[Finding] = []
    for part, content in (("train", train), ("val", val)):
        manifest = json.loads((shards / part / "manifest.json").read_text(encoding="utf-8"))
        findings += left_out(manifest["quarantined"], len(content["images"]), part)
    findings += [*check_labels(train, val, config), *shared_images(*sets)]
    findings.sort(key=lambda finding: not finding.surely_wrong)
    fewer = (len(train["images"]) - len(sets[0]), len(val["images"]) - len(sets[1]))
    prepared = Prepared(
        found(trained, validated, fewer),
        [str(f) for f in findings],
        defaults,
        starts_from(config),
        epochs=config.schedule.epochs,
        subfolders=any("/" in str(image["file_name"]) for image in train["images"]),
    )
    step("data")
    print("\n".join(prepared.found))
    print("\n".join(prepared.findings or ["label check: nothing looks wrong"]))
    step("defaults for these images; every one can be given")
    print("\n".join(prepared.defaults))
    print(prepared.weights, flush=True)
    if findings and findings[0].surely_wrong and not options.train_anyway:
        raise UserError(f"{findings[0]}; --train-anyway trains on them as they are")
    return prepared


def is_finished(run: Path, config: RunConfig) -> bool:
    """Whether this very training has ended in the folder. Raises `UserError` where the folder is
    of a training with another config."""
    from pipeline.dataset import open_dataset
    from pipeline.run_folder import differences, read_identity
    from pipeline.tracking import read_lines

    if not (run / "config.json").is_file():
        return False
    classes = open_dataset(config).labels.num_classes
    config = replace(config, model=replace(config.model, num_classes=classes))
    identity = read_identity(run)
    if identity["config_digest"] != config.digest():
        raise UserError(
            f"--output {run.parent} holds a training with another config "
            f"({differences(config, identity) or 'of an earlier version'}); give the same options "
            f"as then to go on with it, or choose another --output"
        )
    if not (run / "metrics.jsonl").is_file():
        return False
    return any(line.get("event") == "finished" for line in read_lines(run / "metrics.jsonl"))


def train(options: OwnDataOptions, config: RunConfig, run: Path) -> None:
    """Trains as a Ray job in the folder `run`, or goes on with what is there, until it ends."""
    code = Code.present()
    spec = JobSpec(
        config=config.to_json(),
        folder=str(run),
        workers=options.workers,
        cpus_per_worker=options.cpus_per_worker,
        tracking_uri=options.tracking_uri,
        experiment=options.experiment,
        code=code.commit,
        code_digest=code.digest,
    )
    step("training")
    launch(spec, options.address, wait=True)
