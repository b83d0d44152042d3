"""`python -m jobs train|submit|grid|compare|serve|demo|status|logs|stop|resume`: jobs on Ray."""

import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from jobs.demo import DemoOptions, demo
from jobs.grid_command import run_grid
from jobs.grid_state import Code
from jobs.grid_status import status
from jobs.launch import finish, launch
from jobs.own_data import run_train
from jobs.resume import run_resume
from jobs.serve import run_serve
from jobs.spec import JobSpec, from_the_root
from jobs.submit import connect, stop
from jobs.tracking import check_model_name, check_tracking_uri
from model.config_checks import check_numbers
from pipeline.cli import REQUIRED, Command, RunOptions, main, parse, parse_run
from pipeline.errors import UserError


@dataclass(frozen=True)
class SubmitOptions:
    config: RunOptions
    output: Path = REQUIRED
    """The run folder, on storage that every node sees. One that exists is resumed."""
    address: str = ""
    """Ray Jobs address, such as http://HOST:8265. Empty: a local Ray for this job alone."""
    workers: int = 1
    """Training processes; each takes a GPU where the cluster has them."""
    cpus_per_worker: int = 1
    min_workers: int = 0
    """Elastic: goes on with as few workers as this after a loss, and with more, up to --workers,
    when there is room again. 0: always --workers of them."""
    resize_interval: float = 60.0
    """Elastic: seconds between two looks whether there is room for more workers."""
    restarts: int = 3
    """How often the job starts over from its last checkpoint after failures without a new
    checkpoint between them. Failures of a job that gets on in between are not limited."""
    grace: float = 120.0
    """Seconds that a job has to save once it is told to stop."""
    tracking_uri: str = ""
    """MLflow, without a password (docs/cluster.md says where that goes). Empty: the node's
    MLFLOW_TRACKING_URI, else an SQLite store beside the run folder."""
    experiment: str = "deformable-detr"
    register: bool = True
    """Register the best checkpoint in MLflow's model registry when the run has finished."""
    model_name: str = ""
    """Its name there. Empty: the recipe's."""
    wait: bool = True
    """Follow the job's log until it ends."""

    def __post_init__(self) -> None:
        check_numbers(self)


@dataclass(frozen=True)
class JobOptions:
    job: str
    """The id that submit printed."""
    address: str
    """Ray Jobs address, such as http://HOST:8265."""


@dataclass(frozen=True)
class StatusOptions:
    address: str = ""
    """Ray Jobs address, such as http://HOST:8265."""
    grid: Path | None = None
    """Folder of a grid, whose cells are listed in place of a cluster's jobs."""
    watch: bool = False
    """Of a grid: show it anew as long as something runs."""


@dataclass(frozen=True)
class CompareOptions:
    targets: Positional[tuple[str, ...]] = ()
    """A grid (its folder, or its name below outputs/grids), or run folders."""
    output: Path | None = None
    """Folder for compare.html, .md and .csv, and its figures. Default: the grid's own folder;
    outputs/comparison for run folders."""
    val: str = ""
    """Shard folder of the validation set, where it is not any more where the runs had it."""
    resamples: int = 1000
    """Resampled image sets of the bootstrap. 0: no intervals over images."""


def run_submit(args: list[str]) -> None:
    options = parse_run(
        SubmitOptions,
        args,
        "python -m jobs submit",
        "Submits a training run to a Ray cluster and follows it.\n\nExample: "
        "python -m jobs submit deformable_detr_r50 --output /shared/runs/r50 --workers 16 "
        "--data.train /shared/train --data.val /shared/val --address http://head:8265",
        output=REQUIRED,
    )
    check(options)
    if not options.address:
        from pipeline.dataset import open_dataset

        open_dataset(options.config)  # the shards are on this machine: look before Ray is started
    code = Code.present()
    spec = JobSpec(
        config=from_the_root(options.config).to_json(),
        folder=str(options.output.resolve()),
        workers=options.workers,
        cpus_per_worker=options.cpus_per_worker,
        min_workers=options.min_workers,
        resize_interval=options.resize_interval,
        restarts=options.restarts,
        grace=options.grace,
        tracking_uri=options.tracking_uri,
        experiment=options.experiment,
        register=options.register,
        model_name=options.model_name,
        code=code.commit,
        code_digest=code.digest,
    )
    launch(spec, options.address, options.wait)


def check(options: SubmitOptions) -> None:
    """Raises `UserError` for what can be seen to be wrong without a cluster."""
    if options.workers < 1 or options.cpus_per_worker < 1 or options.restarts < 0:
        raise UserError(
            f"workers {options.workers}, cpus-per-worker {options.cpus_per_worker}, restarts "
            f"{options.restarts}: expected at least 1, 1 and 0"
        )
    if not 0 <= options.min_workers <= options.workers:
        raise UserError(
            f"min-workers: got {options.min_workers}, expected 0 to --workers {options.workers}"
        )
    if not (1 <= options.grace <= 1e6 and 0 < options.resize_interval <= 1e6):
        raise UserError(
            f"grace {options.grace:g} s, resize-interval {options.resize_interval:g} s: expected "
            f"at least 1 and above 0, at most 1e6"
        )
    from pipeline.data.loader import micro_batch_size  # brings torch

    for workers in range(options.min_workers or options.workers, options.workers + 1):
        micro_batch_size(options.config, workers)
    check_tracking_uri(options.tracking_uri)
    check_model_name(options.model_name)


def run_logs(args: list[str]) -> None:
    options = job_options(args, "logs", "Follows a job's log until it ends.")
    client = connect(options.address)
    require(client, options.job)
    finish(client, options.job, stop_on_interrupt=False)


def run_stop(args: list[str]) -> None:
    options = job_options(
        args, "stop", "Has a job save and stop; submitting the same run goes on from there."
    )
    client = connect(options.address)
    require(client, options.job)
    print(f"{options.job}: {stop(client, options.job)}")


def run_status(args: list[str]) -> None:
    options = parse(
        StatusOptions,
        args,
        "python -m jobs status",
        "Lists the cluster's jobs, or a grid's cells.\n\n"
        "Example: python -m jobs status --address http://head:8265\n"
        "         python -m jobs status --grid outputs/grids/table2 --watch",
    )
    if (options.grid is None) == (not options.address):
        raise UserError("expected either --address http://HOST:8265 or --grid FOLDER")
    if options.grid:
        status(options.grid, options.watch)
        return
    jobs = [j for j in connect(options.address).list_jobs() if j.submission_id]
    print(f"{'job':<32}{'status':<12}{'recipe':<36}run folder")
    for job in sorted(jobs, key=lambda j: j.start_time or 0):
        about = job.metadata or {}
        print(
            f"{job.submission_id:<32}{job.status.value:<12}{about.get('recipe', '-'):<36}"
            f"{about.get('folder', '-')}"
        )


def job_options(args: list[str], command: str, description: str) -> JobOptions:
    prog = f"python -m jobs {command}"
    example = f"Example: {prog} --job r50-0 --address http://head:8265"
    return parse(JobOptions, args, prog, f"{description}\n\n{example}")


def require(client: Any, job_id: str) -> None:
    known = [j.submission_id for j in client.list_jobs() if j.submission_id]
    if job_id not in known:
        raise UserError(f"no job {job_id!r} on this cluster: expected one of {known}")


def run_demo(args: list[str]) -> None:
    description = "Runs the main job on this machine, end to end.\n\nExample: python -m jobs demo"
    demo(parse(DemoOptions, args, "python -m jobs demo", description))


def run_compare(args: list[str]) -> None:
    options = parse(
        CompareOptions,
        args,
        "python -m jobs compare",
        "Sets measured beside published numbers, and cells beside a baseline; says what is noise."
        "\n\nExample: python -m jobs compare table2",
    )
    from jobs.compare import report  # brings scipy

    report(options.targets, options.output, options.val, options.resamples)


COMMANDS = {
    "train": Command(run_train, "train on your own images and annotations, in one go"),
    "submit": Command(run_submit, "submit a recipe to a cluster, or run it on a local one"),
    "grid": Command(run_grid, "train a grid of experiments: the paper's tables or your own"),
    "demo": Command(run_demo, "draw data, train on it and evaluate, all on this machine"),
    "status": Command(run_status, "the cluster's jobs, or a grid's cells"),
    "logs": Command(run_logs, "follow a job's log"),
    "stop": Command(run_stop, "stop a job"),
    "resume": Command(run_resume, "go on with a run or a grid, as it was begun"),
    "serve": Command(run_serve, "a checkpoint as an HTTP service, with a page to try it on"),
    "compare": Command(run_compare, "a grid or runs beside the paper and each other, as a report"),
}


def interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # so that `with` blocks clean up
        signal.signal(number, interrupt)
    told = "interrupted; what it started is stopped; the same command goes on"
    sys.exit(main("python -m jobs", (__doc__ or "").strip(), COMMANDS, sys.argv[1:], told))
