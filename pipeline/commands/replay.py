"""`python -m pipeline replay`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional

from pipeline.cli import parse


@dataclass(frozen=True)
class ReplayOptions:
    path: Annotated[Path, Positional]
    """A run folder, with a step; or a file of its non_finite/."""
    step: Annotated[int, Positional] = 0
    """The step of the run folder, from 1."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


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

    device = choose_device(EngineConfig(device=options.device), "--device")
    if options.path.is_dir():
        print(replay_step(options.path, options.step, device).report())
    else:
        print(replay_saved(options.path, device)[1])
