"""The driver of a training job: the worker groups, progress on its log, metrics to MLflow.

Runs on the cluster as `python -m jobs.driver`, below `jobs.entry`, with a `JobSpec` in the
environment. SIGTERM has training save and end. Exit status: 0, 2 after a user's mistake, 3 where
it was stopped before the end, 1 after another failure.
"""

import os
import re
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import ray
from ray.exceptions import RayError

from jobs.forwarder import LAST_PAUSES, About, Forwarder, Source
from jobs.group import Group
from jobs.lost import LESS_MEMORY, WorkersLost, in_a_line, killed_for_memory
from jobs.resources import wants_gpu
from jobs.spec import SPEC_VARIABLE, JobSpec
from jobs.summary import summary
from jobs.tracking import choose_tracking_uri, flat, shown
from pipeline.cli import DEBUG_VARIABLE, is_expected, tell
from pipeline.config import RunConfig
from pipeline.data.loader import micro_batch_size, steps_per_epoch
from pipeline.dataset import Dataset, open_dataset
from pipeline.progress import ProgressPrinter

STOPPED = 3  # exit status


def run(spec: JobSpec) -> int:
    """Trains to the end, or until SIGTERM; returns the exit status."""
    folder = Path(spec.folder)
    config = spec.run_config()
    # Mistakes are found here, before a worker group is made.
    dataset = open_dataset(config)
    for workers in range(spec.min_workers or spec.workers, spec.workers + 1):
        micro_batch_size(config, workers)
    steps_per_epoch(dataset.train, config.optimizer.batch_size)
    # Workers speak through the run's metrics file; what libraries print is in Ray's own logs.
    ray.init(address="auto", log_to_driver=False, logging_level="WARNING")
    use_gpu = wants_gpu(config, spec.workers, int(ray.cluster_resources().get("GPU", 0)))
    config = replace(config, engine=replace(config.engine, device="cuda" if use_gpu else "cpu"))

    folder.mkdir(parents=True, exist_ok=True)
    uri = choose_tracking_uri(spec.tracking_uri, folder)
    group = Group(spec, config, use_gpu)
    for number in (signal.SIGTERM, signal.SIGINT):  # after ray.init, which sets its own
        signal.signal(number, lambda *_: group.ask_to_stop())
    print(starting(spec.workers, group.need), flush=True)
    forwarder = Forwarder(folder, uri, about(spec, config, dataset))
    printer = ProgressPrinter(folder, config.recipe)
    forwarder.start()
    printer.start()
    status = "FAILED"
    try:
        status = "FINISHED" if group.train() else "KILLED"
    finally:
        printer.finish()
        # In a grid nothing waits for a server: its command sends what is left when all have ended.
        patient = status == "FINISHED" and not spec.grid
        forwarder.finish(status, LAST_PAUSES if patient else ())
    if status == "KILLED":
        print("stopped as asked; submitting the same run goes on from there", flush=True)
        return STOPPED
    print(summary(folder, uri), flush=True)
    return 0


def about(spec: JobSpec, config: RunConfig, dataset: Dataset) -> About:
    """What MLflow is told of the run."""
    # As training itself does it: the data say how many classes there are.
    config = replace(config, model=replace(config.model, num_classes=dataset.labels.num_classes))
    tags = {
        "recipe": config.recipe,
        "config_digest": config.digest(),
        "train_digest": dataset.train.digest,
        "val_digest": dataset.val.digest,
        "code": spec.code,
        "code_digest": spec.code_digest,
        "mlflow.source.type": "JOB",
        "mlflow.source.name": "python -m jobs",
    }
    if re.fullmatch(r"[0-9a-f]{40}(-dirty)?", spec.code):
        tags["mlflow.source.git.commit"] = spec.code.removesuffix("-dirty")
    sources = tuple(
        Source(
            context=context,
            name="/".join(shards.folder.split("/")[-2:]),
            digest=shards.digest,
            location=shown(shards.folder),
            images=len(shards),
            annotations=int(shards.annotations.sum()),
        )
        for context, shards in (("train", dataset.train), ("validation", dataset.val))
    )
    name = (spec.model_name or config.recipe) if spec.register else ""
    params = flat(asdict(config))
    params |= {f"data.{x}": shown(params[f"data.{x}"]) for x in ("train", "val")}
    return About(spec.experiment, params, tags, sources, name, spec.grid)


def starting(workers: int, need: Mapping[str, float]) -> str:
    """Said before the silence in which Ray starts them and they import torch."""
    each = " and ".join(f"{amount:g} {name}" for name, amount in need.items())
    return (
        f"starting {workers} workers of {each} each"
        if workers > 1
        else f"starting a worker of {each}"
    )


def main() -> int:
    try:
        return run(JobSpec.from_json(os.environ[SPEC_VARIABLE]))
    except WorkersLost as error:
        print(f"error: {error}", flush=True)
        return 1
    except RayError as error:  # the cluster, or the driver's part in it, that is gone
        print(f"error: {of_ray(error)}", flush=True)
        return 1
    except Exception as error:
        if not is_expected(error):  # a bug, which may not come again: its traceback in any case
            os.environ[DEBUG_VARIABLE] = "1"
        return tell(error, sys.stdout)


def of_ray(error: RayError) -> str:
    """What ended the training, and what helps where it was memory."""
    line = in_a_line(error)
    return f"{line}; {LESS_MEMORY}" if killed_for_memory(error) else line


if __name__ == "__main__":
    sys.exit(main())
