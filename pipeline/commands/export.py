"""`python -m pipeline export`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.cli import parse


@dataclass(frozen=True)
class ExportOptions:
    checkpoint: Path
    """A run folder (its best checkpoint), a checkpoint in it, or a model.pt."""
    output: Path
    """The folder to write; it must not be there yet."""
    format: Literal["transformers"] = "transformers"


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
