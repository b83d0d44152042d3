"""The entry point of a training job: a Ray Train worker group around `pipeline.train.train`.

Runs on the cluster as `python -m jobs.driver`, with a `JobSpec` in the environment. Prints
progress, forwards metrics to MLflow, and ends with a summary. Exit status: 0, 2 after a user's
mistake, 1 after another failure.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, ScalingConfig
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from jobs.spec import SPEC_VARIABLE, JobSpec
from jobs.summary import summary
from jobs.tracking import Forwarder, default_tracking_uri
from pipeline.config import RunConfig
from pipeline.data.loader import micro_batch_size, steps_per_epoch
from pipeline.dataset import open_dataset
from pipeline.errors import UserError
from pipeline.progress import ProgressPrinter

# Failures that would come again with every restart.
PERMANENT = (UserError, FloatingPointError, ImportError)


def worker(arguments: dict[str, str]) -> None:
    """Runs in every process of the group."""
    import torch

    from pipeline.train import train

    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    train(RunConfig.from_json(arguments["config"]), Path(arguments["folder"]))


def run(spec: JobSpec) -> None:
    """Trains to the end, restarting after failures that may pass, up to `spec.restarts` times."""
    folder = Path(spec.folder)
    config = spec.run_config()
    # Mistakes are found here, before a worker group is made.
    dataset = open_dataset(config)
    micro_batch_size(config, spec.workers)
    steps_per_epoch(dataset.train, config.optimizer.batch_size)
    # Workers speak through the run's metrics file; what libraries print is in Ray's own logs.
    ray.init(address="auto", log_to_driver=False, logging_level="WARNING")
    use_gpu = wants_gpu(config, spec.workers, int(ray.cluster_resources().get("GPU", 0)))
    config = replace(config, engine=replace(config.engine, device="cuda" if use_gpu else "cpu"))

    folder.mkdir(parents=True, exist_ok=True)
    uri = spec.tracking_uri or default_tracking_uri(folder)
    tags = {
        "recipe": config.recipe,
        "config_digest": config.digest(),
        "train_digest": dataset.train.digest,
        "val_digest": dataset.val.digest,
        "code": spec.code,
    }
    forwarder = Forwarder(folder, config, uri, spec.experiment, tags)
    printer = ProgressPrinter(folder, config.recipe)
    forwarder.start()
    printer.start()
    status = "FAILED"
    try:
        fit(spec, config, use_gpu)
        status = "FINISHED"
    finally:
        printer.finish()
        forwarder.finish(status)
    print(summary(folder, uri), flush=True)


def wants_gpu(config: RunConfig, workers: int, gpus: int) -> bool:
    """Whether workers take a GPU each, given how many the cluster has."""
    if config.engine.device == "cuda" and gpus < workers:
        raise UserError(
            f"engine.device cuda: got a cluster with {gpus} GPUs, expected {workers}, one for each "
            f"worker; lower --workers, add GPU nodes, or use --engine.device cpu"
        )
    return config.engine.device != "cpu" and gpus >= workers


def fit(spec: JobSpec, config: RunConfig, use_gpu: bool) -> None:
    resources = {"CPU": spec.cpus_per_worker} | ({"GPU": 1} if use_gpu else {})
    for attempt in range(spec.restarts + 1):
        trainer = TorchTrainer(
            worker,
            train_loop_config={"config": config.to_json(), "folder": spec.folder},
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=spec.workers,
                use_gpu=use_gpu,
                resources_per_worker=resources,
            ),
            run_config=RayRunConfig(
                storage_path=str(Path(spec.folder) / "ray"),
                name=f"attempt-{os.environ.get('RAY_JOB_ID', '0')}-{attempt}",
                failure_config=FailureConfig(max_failures=0),
            ),
        )
        try:
            trainer.fit()
            return
        except TrainingFailedError as error:
            cause = root_cause(error)
            if isinstance(cause, PERMANENT) or attempt == spec.restarts:
                raise cause from error
            print(f"attempt {attempt + 1} failed ({_first_line(cause)}); restarting", flush=True)


def root_cause(error: TrainingFailedError) -> BaseException:
    """The exception of the worker that failed first, as far as it can be told: a user's mistake
    rather than the collective that broke because of it."""
    if not isinstance(error, WorkerGroupError):
        return error
    failures: list[Any] = [error.worker_failures[rank] for rank in sorted(error.worker_failures)]
    causes = [getattr(f, "cause", None) or f for f in failures]
    return next((c for c in causes if isinstance(c, PERMANENT)), causes[0] if causes else error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def main() -> int:
    try:
        run(JobSpec.from_json(os.environ[SPEC_VARIABLE]))
    except (*PERMANENT, OSError) as error:  # OSError: such as a run folder that cannot be made
        print(f"error: {error}", flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
