"""`python -m pipeline train`."""

import os
import signal
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from pipeline.cli import REQUIRED, RunOptions, parse_run
from pipeline.errors import Stopped, Unreachable


@dataclass(frozen=True)
class TrainOptions:
    config: RunOptions
    output: Path = REQUIRED
    """The run folder. One that exists is resumed."""


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
