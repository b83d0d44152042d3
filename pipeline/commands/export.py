"""`python -m pipeline export`."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional

from pipeline.cli import parse


@dataclass(frozen=True)
class ExportOptions:
    checkpoint: Annotated[Path, Positional]
    """A run folder (its best checkpoint), a checkpoint in it, or a model.pt."""
    format: Literal["onnx", "torch", "safetensors", "transformers"]
    """A graph from pixels to detections for onnxruntime (.onnx) or for torch alone (.pt2); weights
    without pickle (.safetensors); or a folder for transformers' from_pretrained."""
    output: Path
    """The file or the folder to write; it must not be there yet."""


def run_export(args: list[str]) -> None:
    options = parse(
        ExportOptions,
        args,
        "python -m pipeline export",
        "Writes a checkpoint in a form that runs without this repository. A graph is run before it "
        "is kept, at three shapes, and must detect what the checkpoint does.\n\nExample: "
        "python -m pipeline export runs/r50 --format onnx --output r50.onnx",
    )
    from pipeline.export import export

    say = partial(print, flush=True)
    export(options.checkpoint, options.format, options.output, say)
    print(f"saved {options.output}")
