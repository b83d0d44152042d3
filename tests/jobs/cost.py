"""What do DeepSpeed, Ray and tracking cost a training step, beside a bare loop of PyTorch?

    python -m tests.jobs.cost TRAIN VAL

trains `deformable_detr_r50` on the shards, small images, in one process: as `python -m jobs submit`
does, and as a loop of the same model, loss, optimizer and loader alone, in turn. Seconds a step are
taken over whole rounds, the first steps of each left out.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from torch.nn.utils import clip_grad_norm_

from model.criterion import build_criterion
from model.detr import build_model
from pipeline.config import RunConfig
from pipeline.data.loader import training_steps
from pipeline.dataset import open_dataset
from pipeline.engine import AUTOCAST, build_optimizer
from pipeline.recipes import recipe
from pipeline.tracking import read_lines

ROOT = Path(__file__).resolve().parents[2]
WARM_UP = 4  # steps of each round that do not count


@dataclass(frozen=True)
class Options:
    train: tyro.conf.Positional[str]
    """Shard folder to train on."""
    val: tyro.conf.Positional[str]
    """Shard folder of the evaluation, which is not timed."""
    side: int = 256
    """Shorter side of the images, in pixels."""
    batch_size: int = 2
    steps: int = 16
    rounds: int = 5
    threads: int = 2
    bare: str = ""
    """Run the bare loop with this config, and print its seconds a step."""


def config(options: Options) -> RunConfig:
    base = recipe("deformable_detr_r50")
    return replace(
        base,
        data=replace(base.data, train=options.train, val=options.val),
        augment=replace(
            base.augment, short_sides=(options.side,), max_side=2 * options.side,
            val_short_side=options.side, crop_probability=0.0,
        ),
        optimizer=replace(base.optimizer, batch_size=options.batch_size),
        engine=replace(base.engine, loader_workers=1, log_every=1, device="cpu"),
        schedule=replace(base.schedule, epochs=1, drop_epochs=()),
    )  # fmt: skip


def bare(options: Options) -> None:
    """A loop as one would write it without any of it."""
    settings = RunConfig.from_json(options.bare)
    dataset = open_dataset(settings)
    torch.manual_seed(0)
    model = build_model(replace(settings.model, num_classes=dataset.labels.num_classes)).train()
    criterion = build_criterion(settings.model)
    optimizer = build_optimizer(model, settings)
    dtype = AUTOCAST[settings.engine.precision]
    times = [time.perf_counter()]
    steps = range(WARM_UP + options.steps)
    for step in training_steps(dataset.train, dataset.labels, settings, steps, 0, 1, False):
        for batch in step:
            boxes = max(1, sum(len(t["labels"]) for t in batch.targets))
            with torch.autocast("cpu", dtype=dtype):
                outputs = model(batch.normalized_images(), batch.padding_mask)
            criterion(outputs, batch.targets, torch.tensor(float(boxes)))["loss"].backward()
        clip_grad_norm_(model.parameters(), settings.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter())
    print(json.dumps(seconds_a_step(times[1:])))


def seconds_a_step(times: list[float]) -> list[float]:
    return [b - a for a, b in zip(times[WARM_UP - 1 :], times[WARM_UP:], strict=False)]


def run_bare(options: Options, settings: RunConfig) -> list[float]:
    command = ["-m", "tests.jobs.cost", options.train, options.val, "--bare", settings.to_json(),
               "--steps", str(options.steps)]  # fmt: skip
    done = started([sys.executable, *command], options)
    return json.loads(done.splitlines()[-1])


def run_ours(options: Options, settings: RunConfig, folder: Path) -> list[float]:
    """The job is stopped after its steps."""
    command = [
        sys.executable, "-m", "jobs", "submit", "deformable_detr_r50", "--output", str(folder),
        "--workers", "1", "--cpus-per-worker", str(options.threads),
    ]  # fmt: skip
    for section in ("data", "augment", "optimizer", "engine", "schedule"):
        given, default = (getattr(c, section) for c in (settings, recipe("deformable_detr_r50")))
        for name, value in vars(given).items():
            if value != getattr(default, name):
                values = value if isinstance(value, tuple) else (value,)
                command += [f"--{section}.{name.replace('_', '-')}", *map(str, values)]
    with tempfile.TemporaryFile("w+") as log:
        job = subprocess.Popen(command, cwd=ROOT, env=environment(options), stdout=log, stderr=log)
        while True:
            lines = train_lines(folder)
            if len(lines) >= WARM_UP + options.steps or job.poll() is not None:
                break
            time.sleep(1)
        job.terminate()
        job.wait()
        log.seek(0)
        assert len(lines) >= WARM_UP + options.steps, log.read()
    return seconds_a_step([x["time"] for x in lines[: WARM_UP + options.steps]])


def train_lines(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    return [x for x in read_lines(path) if x["kind"] == "train"] if path.exists() else []


def environment(options: Options) -> dict[str, str]:
    # Ray runs workers at low priority; here nothing else is to run.
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(options.threads),
        "RAY_worker_niceness": "0",
    }


def started(command: list[str], options: Options) -> str:
    done = subprocess.run(
        command, cwd=ROOT, env=environment(options), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def main(options: Options) -> None:
    if options.bare:
        bare(options)
        return
    settings = config(options)
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            ours = statistics.median(run_ours(options, settings, Path(folder) / str(number)))
            alone = statistics.median(run_bare(options, settings))
            ratios.append(ours / alone)
            print(f"ours {ours:.3f} s a step, bare {alone:.3f}: {ours / alone:.3f}", flush=True)
    print(f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})")


if __name__ == "__main__":
    main(tyro.cli(Options))
