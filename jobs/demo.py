"""The main job on this machine, end to end, from drawn pictures to MLflow.

`make demo` runs it: data -> shards -> a local Ray -> a job of two workers -> evaluation, picture
and MLflow. An interrupted demo is continued, a finished one is run anew.
"""

import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from jobs.cluster import available_cpus, local_cluster
from jobs.grid_state import Code
from jobs.launch import finish
from jobs.spec import ROOT, JobSpec
from jobs.submit import connect, submit
from pipeline.errors import UserError
from pipeline.recipes import recipe

WORKERS = 2


@dataclass(frozen=True)
class DemoOptions:
    output: Path = Path("outputs/demo")
    """Folder for data, shards and runs."""
    train_images: int = 3000
    val_images: int = 200
    epochs: int = 0
    """Length of the training; 0: the recipe's."""


def demo(options: DemoOptions) -> None:
    """Draws, converts, trains on a local Ray and evaluates. Raises `UserError` where the job
    fails."""
    started = time.monotonic()
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    shards = prepare(output, options)
    config = recipe("demo")
    config = replace(
        config,
        data=replace(config.data, train=str(shards / "train"), val=str(shards / "val")),
        schedule=replace(config.schedule, epochs=options.epochs or config.schedule.epochs),
    )
    folder = run_folder(output)
    code = Code.present()
    spec = JobSpec(
        config=config.to_json(),
        folder=str(folder),
        workers=WORKERS,
        cpus_per_worker=max(1, available_cpus() // WORKERS),
        experiment="demo",
        code=code.commit,
        code_digest=code.digest,
    )
    step("starting a local Ray")
    with local_cluster() as cluster:
        client = connect(cluster.jobs)
        job_id = submit(client, spec, f"demo-{folder.name}")
        step(f"submitted job {job_id} to {cluster.jobs}")
        finish(client, job_id, stop_on_interrupt=True)
        step("stopping Ray")
    step(f"done in {time.monotonic() - started:.0f} s")


def prepare(output: Path, options: DemoOptions) -> Path:
    """Draws the pictures and converts them, unless that is done already; returns the shards."""
    size = f"{options.train_images}-{options.val_images}"
    data, shards = output / f"coco-{size}", output / f"shards-{size}"
    if not (data / "annotations").is_dir():
        step("drawing pictures")
        data_prep(
            "synthesize", "--output", str(data),
            "--train", str(options.train_images), "--val", str(options.val_images),
        )  # fmt: skip
    for split in ("train", "val"):
        step(f"converting {split}")
        data_prep(
            "convert", "--images", str(data / split),
            "--annotations", str(data / "annotations" / f"instances_{split}.json"),
            "--output", str(shards / split),
        )  # fmt: skip
    return shards


def data_prep(*arguments: str) -> None:
    """Runs `python -m data_prep`. Raises `UserError` where it fails."""
    command = [sys.executable, "-m", "data_prep", *arguments]
    if subprocess.run(command, cwd=ROOT).returncode:
        raise UserError(f"{' '.join(command[1:])} failed; its message is above")


def run_folder(output: Path) -> Path:
    """The newest run that has not finished, else a new one."""
    runs = sorted((output / "runs").glob("run-*"))
    if runs and not (runs[-1] / "predictions.png").exists():
        return runs[-1]
    return output / "runs" / f"run-{len(runs) + 1:03d}"


def step(message: str) -> None:
    """Announces a step of the demo."""
    print(f"\n==> {message}", flush=True)
