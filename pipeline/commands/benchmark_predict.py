"""`python -m pipeline benchmark-predict`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional

from pipeline.cli import parse


@dataclass(frozen=True)
class BenchmarkPredictOptions:
    target: Annotated[str, Positional]
    """A run folder (its best checkpoint), a checkpoint in it, a model.pt, or a recipe's name: its
    model before training, which is as fast."""
    beside: tuple[Literal["transformers", "onnx", "torch"], ...] = ()
    """Others, with the same weights: transformers' model; the exported files, run by onnxruntime
    and by torch, on a CPU alone."""
    size: tuple[int, int] = (800, 1066)
    """Height and width of the images."""
    batch_sizes: tuple[int, ...] = (1, 4)
    repeats: int = 20
    """Timed batches of each contender, for each batch size."""
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    output: Path | None = None
    """Write the figures as JSON, too; what is measured so far is there at any time."""


def run_benchmark_predict(args: list[str]) -> None:
    options = parse(
        BenchmarkPredictOptions,
        args,
        "python -m pipeline benchmark-predict",
        "Times prediction, from a batch of pixels to detections, beside other implementations, all "
        "of them in turn on the same images.\n\nExample: python -m pipeline benchmark-predict "
        "runs/r50 --batch-sizes 1 4 --beside transformers onnx --output predict.json",
    )
    from pipeline.benchmark_predict import run

    run(
        options.target, options.beside, options.size, options.batch_sizes, options.repeats,
        options.precision, options.device, options.output,
    )  # fmt: skip
