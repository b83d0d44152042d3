"""`python -m pipeline universal`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from pipeline.cli import parse


@dataclass(frozen=True)
class UniversalOptions:
    checkpoint: Annotated[Path, Positional]
    """A run folder (its best checkpoint), or a checkpoint in it."""
    output: Path
    """The folder to write; it must not be there yet."""


def run_universal(args: list[str]) -> None:
    options = parse(
        UniversalOptions,
        args,
        "python -m pipeline universal",
        "Writes a checkpoint in DeepSpeed's universal format: weights, moments and step, from "
        "which a DeepSpeed program goes on in ZeRO stage 1, 2 or 3 on any number of processes.\n\n"
        "Example: python -m pipeline universal runs/r50 --output r50-universal",
    )
    from pipeline.universal_checkpoint import write_universal

    progress = write_universal(options.checkpoint, options.output)
    print(f"saved {options.output}, where the run was after step {progress.step}")
