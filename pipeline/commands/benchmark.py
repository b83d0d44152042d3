"""`python -m pipeline benchmark-step` and `benchmark-data`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from pipeline.cli import RunOptions, parse, parse_run


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
