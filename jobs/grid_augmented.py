"""A run's best checkpoint evaluated with test-time augmentation, as one more job of a grid.

Runs on the cluster as `python -m jobs.grid_augmented RUN`, with a `JobSpec` in the environment. Its
folder gets what a finished run's has: config.json, metrics.jsonl with one evaluation, at the end of
the schedule, and evaluations/. Exit status as of `jobs.driver`.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.spec import SPEC_VARIABLE, JobSpec
from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.tracking import read_lines
from pipeline.whole_file import write_whole

if TYPE_CHECKING:
    from pipeline.evaluate import Evaluation

SIZES = (0.75, 1.0, 1.25)
"""Of the views, as shares of the evaluation's own. Each is seen mirrored, too."""


def sides(config: RunConfig) -> tuple[int, ...]:
    """The views' shorter sides in pixels. Empty, for the mirrored view alone, where images are
    evaluated as large as they are."""
    usual = config.augment.val_short_side
    return tuple(round(size * usual) for size in SIZES) if usual else ()


def evaluate(spec: JobSpec, trained: Path, device: str) -> str:
    """Evaluates and writes; returns the table of COCO's numbers."""
    from pipeline.augmented_evaluation import detect_augmented
    from pipeline.evaluate import ground_truth, summarize, table
    from pipeline.predict import Detector

    started = time.time()
    detector = Detector.load(trained, device)
    shards = detector.open(spec.run_config().data.val)
    identity = json.loads((trained / "config.json").read_text(encoding="utf-8"))
    if identity["val_digest"] != shards.digest:
        raise UserError(
            f"{shards.folder} is not the validation data of {trained}: got the digest "
            f"{shards.digest}, expected {identity['val_digest']}"
        )
    detections = detect_augmented(
        detector.model, shards, detector.labels, detector.config, detector.device,
        sides(detector.config),
    )  # fmt: skip
    evaluation = summarize(ground_truth(shards), detections)
    write(Path(spec.folder), trained, evaluation, started)
    return table(evaluation)


def write(folder: Path, trained: Path, evaluation: "Evaluation", started: float) -> None:
    """What a finished run's folder has; metrics.jsonl, which tells that it is, comes last."""
    from pipeline.run_folder import write_detections, write_evaluation

    last = read_lines(trained / "metrics.jsonl")[-1]
    step, epochs = last["step"], round(last["epoch"])
    folder.mkdir(parents=True, exist_ok=True)
    write_detections(folder, evaluation)
    write_evaluation(folder, step, epochs, evaluation)
    shutil.copyfile(trained / "config.json", folder / "config.json")
    classes = {f"AP/{name}": value for name, value in evaluation.per_class.items()}
    start = {"kind": "event", "step": 0, "epoch": 0.0, "time": started, "event": "start"}
    end = {"step": step, "epoch": float(epochs), "time": time.time()}
    lines = [
        {**start, "world": 1, "steps": step, "epochs": epochs},
        {"kind": "evaluation", **end, **evaluation.summary, **classes},
        {"kind": "event", **end, "event": "finished"},
    ]
    write_whole(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def main(trained: str) -> int:
    import ray

    from jobs.resources import wants_gpu

    spec = JobSpec.from_json(os.environ[SPEC_VARIABLE])
    ray.init(address="auto", log_to_driver=False, logging_level="WARNING")
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        use_gpu = wants_gpu(spec.run_config(), 1, gpus)
        task = ray.remote(num_cpus=spec.cpus_per_worker, num_gpus=int(use_gpu))(evaluate)
        print(ray.get(task.remote(spec, Path(trained), "cuda" if use_gpu else "cpu")), flush=True)
    except (UserError, OSError) as error:  # of the task, or before it
        print(f"error: {getattr(error, 'cause', error)}", flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
