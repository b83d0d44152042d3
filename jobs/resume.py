"""`python -m jobs resume`: goes on with a run or a grid as it was begun, options and all.

A run's folder has `ray/job.json`, which its job wrote; a grid's `grid.json` has the command line.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from tyro.conf import Positional

from jobs.grid_command import run_grid
from jobs.grid_state import Code, read_grid
from jobs.launch import launch
from jobs.spec import JobSpec
from pipeline.cli import REQUIRED, parse
from pipeline.errors import UserError


@dataclass(frozen=True)
class ResumeOptions:
    folder: Positional[Path] = REQUIRED
    """Of a run or a grid."""
    address: str | None = None
    """Ray Jobs address, such as http://HOST:8265; "" is a Ray of this machine. Default: a grid's
    own; of a run, a Ray of this machine."""
    workers: int | None = None
    """Training processes of each run, where it is not to be as many as before."""
    wait: bool = True
    """Of a run: follow the job's log until it ends."""


def run_resume(args: list[str]) -> None:
    options = parse(
        ResumeOptions,
        args,
        "python -m jobs resume",
        "Goes on with a run or a grid as it was begun, on the same cluster or another.\n\n"
        "Example: python -m jobs resume /shared/runs/r50 --address http://head:8265\n"
        "         python -m jobs resume outputs/grids/table2",
    )
    if (options.folder / "grid.json").is_file():
        resume_grid(options)
    else:
        resume_run(options)


def resume_grid(options: ResumeOptions) -> None:
    """Gives the grid's command once more, with another address or number of workers where asked."""
    folder = options.folder.resolve()
    command = read_grid(folder).get("command")
    if command is None:
        raise UserError(f"grid {folder} does not say how it was begun; give its command once more")
    directory, arguments = Path(command["directory"]), list(command["arguments"])
    if not directory.is_dir():
        raise UserError(
            f"grid {folder} was begun in {directory}, which is not here; give the grid's own "
            f"command once more, with --output {folder}"
        )
    os.chdir(directory)  # paths among the arguments start there
    given = {"--address": options.address, "--workers": options.workers, "--output": folder}
    for name, value in given.items():
        if value is not None:
            arguments = [*without(arguments, name), name, str(value)]
    run_grid(arguments)


def resume_run(options: ResumeOptions) -> None:
    """Submits the run's last job again. Raises `UserError` where the folder does not know it."""
    folder = options.folder.resolve()
    spec = begun(folder)
    workers, code = options.workers or spec.workers, Code.present()
    spec = replace(
        spec,
        folder=str(folder),
        workers=workers,
        min_workers=min(spec.min_workers, workers),
        code=code.commit,
        code_digest=code.digest,
    )
    launch(spec, options.address or "", options.wait)


def begun(folder: Path) -> JobSpec:
    """What the run's last job was told."""
    path = folder / "ray" / "job.json"
    if not path.is_file():
        raise UserError(
            f"{folder} is no folder of a run or a grid that jobs began: it has neither "
            f"ray/job.json nor grid.json; give the command that began it once more"
        )
    try:
        return JobSpec.from_json(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path} is not of this version ({error}); give the command once more"
        ) from None


def without(arguments: list[str], name: str) -> list[str]:
    """The arguments but for option `name` and its value."""
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == name:
            skip = True
        elif not argument.startswith(f"{name}="):
            kept.append(argument)
    return kept
