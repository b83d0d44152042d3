"""`python -m pipeline train|evaluate|predict|visualize|export|replay|benchmark-step|…`."""

import json
import os
import signal
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional

from pipeline.cli import REQUIRED, Command, RunOptions, main, parse, parse_run
from pipeline.errors import Stopped, Unreachable, UserError
from pipeline.recipes import DEMO_SCALE, RECIPES


@dataclass(frozen=True)
class TrainOptions:
    config: RunOptions
    output: Path = REQUIRED
    """The run folder. One that exists is resumed."""


@dataclass(frozen=True)
class EvaluateOptions:
    checkpoint: Path
    """A run folder (its best checkpoint), a checkpoint in it, or a model.pt."""
    data: str
    """Shard folder, or its URL, to evaluate on."""
    output: Path | None = None
    """Also write the detections as a COCO result file."""
    tta: bool = False
    """Test-time augmentation: each image mirrored, too, and the detections merged."""
    tta_sides: tuple[int, ...] = ()
    """With --tta: the shorter sides, in pixels, in which each image is seen. Empty: as trained."""
    device: str = "auto"
    batch_size: int = 0
    """Images in one forward pass. 0: as in the run's own evaluations."""


@dataclass(frozen=True)
class PredictOptions:
    checkpoint: Path
    """A run folder (its best checkpoint), a checkpoint in it, or a model.pt."""
    data: str
    """Shard folder, or its URL, whose images are drawn."""
    output: Path = Path("predictions.png")
    count: int = 6
    """Number of images, spread over the set."""
    threshold: float = 0.3
    """Smallest score that is drawn."""
    device: str = "auto"


@dataclass(frozen=True)
class VisualizeOptions:
    checkpoint: Annotated[Path, Positional]
    """A run folder (its best checkpoint), a checkpoint in it, or a model.pt."""
    data: str
    """Shard folder, or its URL, whose images are looked at."""
    output: Path = Path("figures")
    """Folder for the pictures."""
    image_ids: tuple[int, ...] = ()
    """Ids of the images. None: --count of them."""
    count: int = 4
    """Number of images, spread over the set."""
    objects: int = 3
    """The best of an image that are drawn, at most."""
    threshold: float = 0.3
    """Smallest score that is drawn."""
    device: str = "auto"


@dataclass(frozen=True)
class ReplayOptions:
    path: Annotated[Path, Positional]
    """A run folder, with a step; or a file of its non_finite/."""
    step: Annotated[int, Positional] = 0
    """The step of the run folder, from 1."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True)
class BenchmarkStepOptions:
    config: RunOptions
    size: tuple[int, int] = (800, 1333)
    """Height and width of the images."""
    batch_sizes: tuple[int, ...] = (2,)
    precisions: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    compile: bool = False
    """Also time the model by torch.compile."""
    beside: tuple[str, ...] = ()
    """Other contenders. Ours by another operator: reference, grid_sample. The trainer's engine:
    deepspeed. Other implementations: transformers, official=PATH (extension built)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    steps: int = 20
    """Timed steps of each contender, for each batch size and precision."""
    data: str = ""
    """Shard folder, or its URL: also time the loader, at this size."""
    workers: int = 4
    """Processes of that loader."""
    output: Path | None = None
    """Write the figures as JSON, too; what is measured so far is there at any time."""


@dataclass(frozen=True)
class BenchmarkDataOptions:
    data: Positional[str] = ""
    """Shard folder whose images are taken. None: pictures are drawn, with a photograph's spectrum
    and file size."""
    images: int = 64
    """How many, spread over the shards."""
    batch_size: int = 2
    size: tuple[int, int] = (480, 640)
    """Height and width of the drawn pictures."""
    output: Path | None = None
    """Write the figures as JSON, too."""


@dataclass(frozen=True)
class ExportOptions:
    checkpoint: Path
    """A run folder (its best checkpoint), a checkpoint in it, or a model.pt."""
    output: Path
    """The folder to write; it must not be there yet."""
    format: Literal["transformers"] = "transformers"


@dataclass(frozen=True)
class DescribeOptions:
    recipes: Positional[tuple[str, ...]] = ()
    """Recipes to describe. None: all of them."""
    output: Path | None = None
    """Also write the table: a .md file, or a .json one with exact numbers."""


def run_train(args: list[str]) -> None:
    options = parse_run(
        TrainOptions,
        args,
        "python -m pipeline train",
        "Trains a recipe in this process, or in the processes of torchrun.\n\nExample: "
        "torchrun --nproc-per-node 8 -m pipeline train deformable_detr_r50 --output runs/r50 "
        "--data.train shards/train --data.val shards/val --init.backbone resnet50.pth",
        output=REQUIRED,
    )
    from pipeline.engine import end_with_torchrun, stop_process_group
    from pipeline.progress import printed_progress
    from pipeline.train import train

    end_with_torchrun()
    first = os.environ.get("RANK", "0") == "0"
    try:
        with printed_progress(options.output, options.config.recipe) if first else nullcontext():
            best = train(options.config, options.output)
    except FloatingPointError as error:  # on every rank; one tells it
        sys.exit(f"error: {error}" if first else 1)
    except Unreachable as error:
        sys.exit(f"error: {error}")
    except Stopped as stopped:
        if first:
            print(stopped)
        sys.exit(128 + signal.SIGTERM)
    stop_process_group()
    if first:
        print(f"best checkpoint: {best}")


def run_evaluate(args: list[str]) -> None:
    options = parse(
        EvaluateOptions,
        args,
        "python -m pipeline evaluate",
        "Prints the COCO numbers of a checkpoint. Data without annotations (COCO's test-dev) only "
        "gives a result file.\n\nExample: python -m pipeline evaluate --checkpoint runs/r50 "
        "--data shards/val --tta --tta-sides 600 800 1000",
    )
    check_evaluation(options)
    from pipeline.augmented_evaluation import detect_augmented
    from pipeline.evaluate import detect, ground_truth, summarize, table
    from pipeline.predict import Detector

    detector = Detector.load(options.checkpoint, options.device)
    config = detector.config
    if options.batch_size:
        engine = replace(config.engine, evaluation_batch=options.batch_size)
        config = replace(config, engine=engine)
    shards = detector.open(options.data)
    truth = ground_truth(shards)
    if not truth.anns and not options.output:
        raise UserError(
            f"{options.data} has no annotations, so there is nothing to compare with; "
            f"--output FILE writes the detections"
        )
    given = (detector.model, shards, detector.labels, config, detector.device)
    detections = detect_augmented(*given, options.tta_sides) if options.tta else detect(*given)
    if options.output:
        options.output.write_text(json.dumps(detections), encoding="utf-8")
    if truth.anns:
        print(table(summarize(truth, detections)))
    else:
        print(f"{options.data} has no annotations: {len(shards)} images, no COCO numbers")
    if options.output:
        print(f"saved {len(detections)} detections in {options.output}")


def check_evaluation(options: EvaluateOptions) -> None:
    """Raises `UserError` for what can be seen before anything is loaded."""
    if options.tta_sides and not options.tta:
        raise UserError("--tta-sides: got sizes without --tta, which they are for")
    if any(side < 1 for side in options.tta_sides):
        raise UserError(f"--tta-sides: got {options.tta_sides}, expected pixels, 1 or more")
    if options.batch_size < 0:
        raise UserError(f"--batch-size: got {options.batch_size}, expected 0 or more")
    if options.output and not options.output.parent.is_dir():
        raise UserError(f"--output: folder {str(options.output.parent)!r} does not exist")


def run_predict(args: list[str]) -> None:
    options = parse(
        PredictOptions,
        args,
        "python -m pipeline predict",
        "Draws a checkpoint's predictions beside the ground truth.\n\nExample: "
        "python -m pipeline predict --checkpoint runs/r50 --data shards/val --output out.png",
    )
    check_picture(options.output)
    from pipeline.predict import Detector
    from pipeline.visualize import draw_predictions

    detector = Detector.load(options.checkpoint, options.device)
    shards = detector.open(options.data)
    draw_predictions(
        detector.model, shards, detector.labels, detector.config, detector.device,
        options.output, options.count, options.threshold,
    )  # fmt: skip
    print(f"saved {options.output}")


def check_picture(output: Path) -> None:
    """Raises `UserError` where no picture can be saved."""
    known = (".png", ".jpg", ".jpeg", ".webp")
    if output.is_dir() or output.suffix.lower() not in known:
        raise UserError(f"--output: got {output}, expected a file ending in {', '.join(known)}")
    if not output.parent.is_dir():
        raise UserError(f"--output: folder {str(output.parent)!r} does not exist")


def run_visualize(args: list[str]) -> None:
    options = parse(
        VisualizeOptions,
        args,
        "python -m pipeline visualize",
        "Draws what a checkpoint looks at: the gradient of each box and class with respect to the "
        "pixels, the sampling points of encoder and decoder, and predictions beside the ground "
        "truth.\n\nExample: python -m pipeline visualize runs/r50 --data shards/val "
        "--image-ids 139 285 --output figures",
    )
    check_figures(options)
    from pipeline.look_inside import choose_images, look_inside
    from pipeline.predict import Detector

    detector = Detector.load(options.checkpoint, options.device)
    shards = detector.open(options.data)
    indices = choose_images(shards, options.image_ids, options.count)
    look_inside(detector, shards, indices, options.output, options.objects, options.threshold)


def check_figures(options: VisualizeOptions) -> None:
    """Raises `UserError` for what can be seen before anything is loaded."""
    for name, value in (("count", options.count), ("objects", options.objects)):
        if value < 1:
            raise UserError(f"--{name}: got {value}, expected 1 or more")
    if not 0 <= options.threshold <= 1:
        raise UserError(f"--threshold: got {options.threshold:g}, expected 0 to 1")
    if options.output.exists() and not options.output.is_dir():
        raise UserError(f"--output: got the file {options.output}, expected a folder")
    if not options.output.parent.is_dir():
        raise UserError(f"--output: folder {str(options.output.parent)!r} does not exist")


def run_export(args: list[str]) -> None:
    options = parse(
        ExportOptions,
        args,
        "python -m pipeline export",
        "Writes a checkpoint as a folder for transformers' from_pretrained.\n\nExample: "
        "python -m pipeline export --checkpoint runs/r50 --format transformers --output r50-hf",
    )
    from pipeline.export import export_for_transformers

    export_for_transformers(options.checkpoint, options.output)
    print(f"saved {options.output}")


def run_replay(args: list[str]) -> None:
    options = parse(
        ReplayOptions,
        args,
        "python -m pipeline replay",
        "Takes a step of a run again on this device, from the checkpoint before it or from what "
        "was saved of it, and says where it went wrong.\n\nExamples: "
        "python -m pipeline replay runs/r50 120\n"
        "python -m pipeline replay runs/r50/non_finite/step-00000120-rank-0.pt",
    )
    from pipeline.config import EngineConfig
    from pipeline.engine import choose_device
    from pipeline.replay import replay_saved, replay_step

    device = choose_device(EngineConfig(device=options.device))
    if options.path.is_dir():
        print(replay_step(options.path, options.step, device).report())
    else:
        print(replay_saved(options.path, device)[1])


def run_benchmark_step(args: list[str]) -> None:
    options = parse_run(
        BenchmarkStepOptions,
        args,
        "python -m pipeline benchmark-step",
        "Times the phases of a training step, beside other operators and implementations.\n\n"
        "Example: python -m pipeline benchmark-step deformable_detr_r50 --batch-sizes 2 4 8 "
        "--compile --beside transformers --output step.json",
    )
    from pipeline.step_report import run

    run(
        options.config,
        ["ours", *(["compile"] if options.compile else []), *options.beside],
        options.size, options.batch_sizes, options.precisions, options.steps, options.device,
        options.data, options.workers, options.output,
    )  # fmt: skip


def run_benchmark_data(args: list[str]) -> None:
    options = parse(
        BenchmarkDataOptions,
        args,
        "python -m pipeline benchmark-data",
        "Times decoding, augmentation and batching on one core, beside the way of the official "
        "code (Pillow and torchvision's transforms).\n\n"
        "Example: python -m pipeline benchmark-data shards/train --output data.json",
    )
    from pipeline.benchmark_data import run

    run(options.data, options.images, options.batch_size, options.size, options.output)


def run_describe(args: list[str]) -> None:
    options = parse(
        DescribeOptions,
        args,
        "python -m pipeline describe",
        "Parameters, multiply-adds and training memory of recipes for an image of 3x800x1066, "
        "beside the published figures.\n\n"
        "Example: python -m pipeline describe deformable_detr_r50 detr_r50_dc5 --output costs.md",
    )
    from pipeline.describe import check_output, describe, table, write

    if options.output:
        check_output(options.output)
    costs = [describe(name) for name in options.recipes or RECIPES]
    print(table(costs))
    if options.output:
        write(costs, options.output)


def run_recipes(args: list[str]) -> None:
    if args and args[0] not in ("-h", "--help"):
        raise UserError(f"python -m pipeline recipes takes no options, got {args}")
    for name, function in RECIPES.items():
        print(f"{name}\n    {(function.__doc__ or '').strip().splitlines()[0]}")
    print(
        f"NAME{DEMO_SCALE}\n    Any of these at demo scale: small, from scratch, minutes on a CPU."
    )


COMMANDS = {
    "train": Command(run_train, "train a recipe, or resume the run in --output"),
    "evaluate": Command(run_evaluate, "COCO numbers of a checkpoint on a shard folder"),
    "predict": Command(run_predict, "a picture of predictions beside the ground truth"),
    "visualize": Command(run_visualize, "what a checkpoint looks at, in pictures"),
    "export": Command(run_export, "a checkpoint for the transformers library"),
    "replay": Command(run_replay, "take a step of a run again"),
    "benchmark-step": Command(run_benchmark_step, "time a training step, beside others"),
    "benchmark-data": Command(run_benchmark_data, "time decoding to batching, beside others"),
    "describe": Command(run_describe, "parameters, multiply-adds and memory of recipes"),
    "recipes": Command(run_recipes, "list the named experiments"),
}

if __name__ == "__main__":
    sys.exit(main("python -m pipeline", (__doc__ or "").strip(), COMMANDS, sys.argv[1:]))
